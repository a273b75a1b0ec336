"""The KL-VAE that users bring: reading its file formats, images to moments, latents to images, normalising latents.

Two families stand behind one interface (`base.VAE`): a checkpoint file with the tensor names of latent diffusion
(LDM), for which `network.KLVAE` is built, and a folder of a diffusers autoencoder that has a posterior.
`load.load_vae` returns either; `load.read_identity` says which latents an encoder makes, without building the network.

Shapes: B images in a batch, S image size, C latent channels, h = w = S / downsampling. Inside the network: c channels,
and z channels between the encoder and `quant_conv`.
"""
