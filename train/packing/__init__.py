"""Making the models that come with the package (`d_emo/packaged`): trained, saved in float16, scored, described."""
