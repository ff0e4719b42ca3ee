"""Video classifiers' scores."""
