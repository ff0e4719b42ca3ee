"""Pictures with coloured rectangles, and COCO's files about them."""

import json
from pathlib import Path

import numpy as np
import PIL.Image

COLOURS = {17: (40, 40, 250), 3: (250, 40, 40)}
NAMES = {17: "blue", 3: "red"}  # in the file in this order; by id the other way round
FIRST_ID, ID_STEP = 100, 7
# A network of which a step takes no second.
NARROW = '{"depths": [1, 1, 1, 1], "widths": [8, 8, 16, 16], "head_dims": [8, 8, 8, 8], "drop_path": 0.2}'
TINY = ["--system", "ssdlite", "--model", "EMOv2-1M", "--model-config", NARROW, "--resolution", "64",
        "--global-batch-size", "4", "--log-every", "1", "--report-to", "none", "--num-workers", "0",
        "--cpu-threads", "1"]  # fmt: skip


def rectangles(seed: int, count: int = 2, size: tuple[int, int] = (80, 64)):
    """A picture (width, height) of rectangles on noise, and x, y, width, height and category of each."""
    random = np.random.RandomState(seed)
    width, height = size
    pixels = random.randint(0, 60, (height, width, 3)).astype(np.uint8)
    found = []
    for _ in range(count):
        across, down = (int(side) for side in random.randint(18, 30, 2))
        x, y, category = random.randint(0, width - across), random.randint(0, height - down), random.choice([3, 17])
        pixels[y : y + down, x : x + across] = COLOURS[int(category)]
        found.append(((int(x), int(y), across, down), int(category)))
    return PIL.Image.fromarray(pixels), found


def instances(count: int = 8, empty: int = 0) -> tuple[dict, list]:
    """The content of an instances file, and its pictures: every second in a sub-folder, the last ones empty."""
    images, annotations, pictures = [], [], []
    for place in range(count):
        picture, found = rectangles(place, 0 if place >= count - empty else 2, (80, 64) if place % 2 else (64, 72))
        pictures.append(picture)
        name, number = f"sub/{place}.png" if place % 2 else f"{place}.png", FIRST_ID + ID_STEP * place
        images.append({"id": number, "file_name": name, "width": picture.width, "height": picture.height})
        for (x, y, across, down), category in found:
            right, bottom = x + across, y + down
            annotations.append(
                {
                    "id": 1 + len(annotations),
                    "image_id": number,
                    "category_id": category,
                    "bbox": [x, y, across, down],
                    "area": across * down,
                    "iscrowd": 0,
                    "segmentation": [[x, y, right, y, right, bottom, x, bottom]],
                }
            )
    categories = [{"id": number, "name": name} for number, name in NAMES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, pictures


def write_instances(folder: Path, count: int = 8, empty: int = 0) -> Path:
    """A folder of pictures with their annotations.json in it."""
    content, pictures = instances(count, empty)
    (folder / "sub").mkdir(parents=True)
    for entry, picture in zip(content["images"], pictures, strict=True):
        picture.save(folder / entry["file_name"])
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def write_panoptic(folder: Path) -> Path:
    """The same pictures with a panoptic file: rectangles are things, what is around them is stuff."""
    write_instances(folder)
    content = json.loads((folder / "annotations.json").read_text())
    (folder / "annotations.json").unlink()
    (folder / "panoptic").mkdir()
    segments: dict[int, list] = {}
    for entry in content["annotations"]:
        segments.setdefault(entry["image_id"], []).append(entry)
    annotations = []
    for image in content["images"]:
        ids = np.full((image["height"], image["width"]), 70_000)
        parts = [{"id": 70_000, "category_id": 92, "bbox": [0, 0, image["width"], image["height"]], "iscrowd": 0}]
        for entry in segments[image["id"]]:
            x, y, across, down = entry["bbox"]
            ids[y : y + down, x : x + across] = 1000 + entry["id"]
            parts.append({"id": 1000 + entry["id"], **{key: entry[key] for key in ("category_id", "bbox", "iscrowd")}})
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        name = Path(image["file_name"]).name
        PIL.Image.fromarray(colours).save(folder / "panoptic" / name)
        annotations.append({"image_id": image["id"], "file_name": name, "segments_info": parts})
    categories = [{**entry, "isthing": 1} for entry in content["categories"]]
    categories.append({"id": 92, "name": "noise", "isthing": 0})
    panoptic = {"images": content["images"], "annotations": annotations, "categories": categories}
    (folder / "panoptic.json").write_text(json.dumps(panoptic))
    return folder
