"""The detection wing."""
