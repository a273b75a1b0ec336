"""KL-VAEs: reading their many file formats, encoding to moments, decoding, and the normalisation of latents."""
