"""Labelled images: where they come from, how they are listed and decoded, their class names, their latents."""
