"""Files as chance would change them."""

import numpy as np


def mutated(content: bytes, random: np.random.RandomState, most: int = 4) -> bytes:
    """Bytes flipped, cut, repeated or filled, up to `most` times."""
    data = bytearray(content)
    for _ in range(random.randint(1, most + 1)):
        if not data:
            break
        kind, place = random.randint(6), random.randint(len(data))
        size = random.randint(1, 1 + min(64, len(data)))
        if kind == 0:
            data[place] = random.randint(256)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = data[place : place + size]
        elif kind == 3:
            data[place : place + size] = bytes(random.choice([0, 255, 127, 128]) for _ in range(size))
        elif kind == 4:
            del data[place : place + size]
        else:
            head = random.randint(min(len(data), 64))  # headers are what parsers believe
            data[head] ^= 1 << random.randint(8)
    return bytes(data)
