"""The denoising network, its schedule, guidance, and the samplers."""
