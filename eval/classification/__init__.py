"""Measuring classifiers."""
