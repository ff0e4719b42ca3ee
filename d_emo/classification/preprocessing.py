"""How pictures become the input of the published classifiers."""

# The published evaluation: resize so that the crop is this share of the short side, bicubic.
CROP_RATIO = 0.875
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
