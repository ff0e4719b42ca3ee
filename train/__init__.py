"""Learning. Installed as `d_emo.train`."""
