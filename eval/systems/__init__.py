"""Our networks of images and clips, by the names that commands take."""
