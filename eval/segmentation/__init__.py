"""Segmenters' scores."""
