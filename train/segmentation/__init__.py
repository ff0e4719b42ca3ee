"""The segmentation wing."""
