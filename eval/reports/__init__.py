"""Pages of pictures and scores."""
