"""The cache of latents: what is in it, encoding what it misses, checking it, and the dataset over it."""
