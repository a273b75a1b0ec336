"""Folders of images, the split into training and test images, and reading one image; without torch.

A class is a sub-folder of the data folder. `folders` lists what is there, `split` divides it into training and test
images without opening a file, `selection` does both as the settings say, and `reading` turns one file into pixels.
"""
