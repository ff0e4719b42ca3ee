"""The command `d-emo`: names for the package's commands, over the same functions as its scripts."""
