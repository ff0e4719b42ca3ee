"""U-EMOv2 and the plain UNet learn the vessels of four real crops, from scratch.

Slow, since it takes a minute on a core that is free: narrow networks, 64 pixels, the vessels' own Dice, which is 0 for
nothing but background and 0.44 for nothing but vessels.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from d_emo import create_segmenter, predict_in_windows

SIDE, STEPS = 64, 150


@pytest.fixture
def crops(shared):
    """The middles of four training pictures at half size, and where their vessels are."""
    folder, pictures, vessels = shared / "data" / "dense" / "retina" / "CHASEDB1" / "train", [], []
    for path in sorted((folder / "images").iterdir())[:4]:
        picture, mask = Image.open(path).convert("RGB"), Image.open(folder / "masks" / f"{path.stem}_1stHO.png")
        width, height = (side // 2 for side in picture.size)
        left, top = (width - SIDE) // 2, (height - SIDE) // 2
        box = (left, top, left + SIDE, top + SIDE)
        pictures.append(picture.resize((width, height)).crop(box))
        vessels.append(np.array(mask.convert("1").resize((width, height), Image.Resampling.NEAREST).crop(box)))
    return pictures, torch.from_numpy(np.stack(vessels)).long()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["U-EMOv2-5M", "UNet-S5-D16"])
def test_it_learns_the_vessels_of_its_training_crops(name, crops):
    pictures, vessels = crops
    torch.manual_seed(0)
    model = create_segmenter(name, num_classes=2, base_channels=8, head_dim=8).train()
    images = model.make_image_processor()(pictures, do_resize=False, return_tensors="pt")["pixel_values"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    for _ in range(STEPS):
        loss = model(images, labels=vessels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    found = predict_in_windows(model, images, window=SIDE, stride=SIDE).argmax(dim=1)
    dice = (2 * (found * vessels).sum() / (found.sum() + vessels.sum())).item()
    print(f"{name}: Dice of the vessels {dice:.3f}")
    assert dice > 0.75
