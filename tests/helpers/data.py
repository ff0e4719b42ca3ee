"""Pictures and sources of pictures, made up."""

import numpy as np
import PIL.Image

from d_emo.images.source import ImageSource


def photo(seed=0, size=(50, 40)):
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def source(names, labels, name="a"):
    return ImageSource(name, len(labels), lambda index: photo(index), np.array(labels), dict(enumerate(names)))
