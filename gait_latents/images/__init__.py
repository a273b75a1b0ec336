"""Folders of images, the split into training and test images, and reading one image."""
