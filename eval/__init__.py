"""Measuring. Installed as `d_emo.eval`."""
