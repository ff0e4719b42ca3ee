"""Recipes of the diffusion trainer side by side: what `recipe_table.py` does."""
