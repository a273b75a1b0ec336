"""The denoising network on latents, its noise schedule, guidance, samplers, and the average of its weights.

The U-Net and the schedule come from the package denoising-diffusion-pytorch (`library`). `model` adds training and
sampling on latents with random numbers that the caller gives, `samplers` has the solvers, and `build` makes the model
that the settings of a run describe.
"""
