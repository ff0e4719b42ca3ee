"""Segmenters: backbones with decode heads, and networks that are segmenters as a whole."""
