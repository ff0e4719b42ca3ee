"""Detectors' scores."""
