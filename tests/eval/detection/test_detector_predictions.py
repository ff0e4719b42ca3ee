"""A detector shown a source: scores as by hand, shares of processes, masks, pictures that cannot be taken."""

from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.data import photo
from helpers.detectors import detector
from helpers.scenes import ellipses, found, scene, scene_source
from torchvision.models.detection import MaskRCNN

from d_emo.detection import mask_rcnn, ssdlite
from d_emo.eval.detection.predict import evaluate_objects
from d_emo.eval.detection.scores import DetectionScores
from d_emo.images.coco import coco_objects
from d_emo.images.decode import UnreadableImageError

CPU = torch.device("cpu")
NAMES = ["a", "b", "c"]


def scenes(masks=False):
    """Pictures of different sizes with an object of each class, one without."""
    found = []
    for index, (width, height) in enumerate([(60, 40), (40, 50), (64, 64), (90, 30), (50, 50)]):
        boxes = [(2, 2, 22, 22), (25, 5, 38, 28), (4, 18, 30, 29)][: 0 if index == 2 else 3]
        picture = photo(index, (width, height))
        found.append(scene(boxes, range(len(boxes)), masks=masks, image_id=9 - index, size=(height, width),
                           image=picture))  # fmt: skip
    return found


class Oracle(MaskRCNN):
    """Finds what is there, in the order in which it is asked; its masks are probabilities."""

    def __init__(self, source):
        torch.nn.Module.__init__(self)
        self.source, self.asked = source, 0

    def forward(self, images):
        there = self.source.read(self.asked)
        self.asked += 1
        assert torch.equal(images[0], torch.from_numpy(np.array(there.image)).permute(2, 0, 1) / 255)
        boxes, kept = there.boxes[~there.crowd], ~there.crowd
        masks = torch.from_numpy(there.masks[kept][:, None] * 0.6 + 0.1)
        return [found(boxes, there.labels[kept], np.full(kept.sum(), 0.9, dtype=np.float32), masks)]


def test_what_finds_everything_has_a_precision_of_one():
    source = scene_source(scenes(masks=True), NAMES)
    values = evaluate_objects(Oracle(source), source, device=CPU).compute()
    assert values["mAP"] == values["mask_mAP"] == pytest.approx(1, abs=1e-6)


def test_real_panoptic_annotations_are_found_whole_by_what_finds_everything(shared):
    folder = shared / "data" / "dense" / "coco" / "val"
    source = coco_objects(folder / "images", folder / "panoptic.json", folder / "panoptic")
    scores = evaluate_objects(Oracle(source), source, device=CPU)
    values = scores.compute()
    assert scores.images == 27 and scores.objects.sum() == source.counts.sum() > 150
    for name in ("mAP", "mAP_small", "mAP_medium", "mAP_large", "mask_mAP", "mask_mAP_small", "mask_mAP_large"):
        assert values[name] == pytest.approx(1, abs=1e-6), name


def test_scores_are_those_of_the_detectors_answers_one_by_one():
    model = detector(ssdlite, score_thresh=0.0).eval()
    source = scene_source(scenes(), NAMES)
    seen = []
    scores = evaluate_objects(model, source, device=CPU, keep=lambda scene, found: seen.append((scene, found)))
    by_hand = DetectionScores(3, masks=False)
    for index in range(source.size):
        there = source.read(index)
        pixels = torch.from_numpy(np.array(there.image)).permute(2, 0, 1) / 255
        with torch.no_grad():
            answer = model([pixels])
        by_hand.update(answer, [there])
        assert seen[index][0] is there and torch.equal(seen[index][1]["boxes"], answer[0]["boxes"])
        assert len(answer[0]["boxes"]) > 10
    assert not scores.masks and scores.compute()["mAP"] > 0
    assert scores.compute() == pytest.approx(by_hand.compute(), abs=1e-9, nan_ok=True)


def test_shares_of_processes_make_the_whole():
    model = detector(ssdlite, score_thresh=0.0).eval()
    source = scene_source(scenes(), NAMES)
    alone = evaluate_objects(model, source, device=CPU)
    first, *others = (
        evaluate_objects(model, source, device=CPU, rank=rank, world_size=7, num_workers=int(rank == 1))
        for rank in range(7)
    )
    for other in others:
        first.merge(other)
    assert first.images == 5 and first.compute() == pytest.approx(alone.compute(), abs=0, nan_ok=True)


@pytest.mark.parametrize("there", [True, False])
def test_masks_are_scored_where_they_are_found_and_known(there):
    model = detector(mask_rcnn, box_score_thresh=0.0, box_detections_per_img=5).eval()
    pictures = scenes(masks=there)[:2]
    kept = []
    source = scene_source(pictures, NAMES)
    scores = evaluate_objects(model, source, device=CPU, keep=lambda scene, found: kept.append(found))
    assert scores.masks == there and ("mask_mAP" in scores.compute()) == there
    for answer, picture in zip(kept, pictures, strict=True):
        assert ("masks" in answer) == there
        if there:
            assert answer["masks"].dtype == torch.bool
            assert answer["masks"].shape == (len(answer["boxes"]), *picture.masks.shape[1:])


def test_grey_detectors_get_grey_pictures():
    class Grey(Oracle):
        image_channels = 1

        def forward(self, images):
            assert images[0].shape[0] == 1
            return [found(masks=torch.zeros(0, 1, *images[0].shape[1:]))]

    source = scene_source(scenes(masks=True), NAMES)
    assert evaluate_objects(Grey(source), source, device=CPU).compute()["mAP"] == 0


def unreadable(index):
    raise UnreadableImageError(f"picture {index} cannot be read (no picture)")


@pytest.mark.parametrize("processes", [0, 1])
def test_an_unreadable_picture_ends_with_its_name(processes):
    source = replace(scene_source(scenes(), NAMES), read=unreadable)
    with pytest.raises(UnreadableImageError, match=r"picture 0 cannot be read .* Repair or remove it"):
        evaluate_objects(detector(ssdlite).eval(), source, device=CPU, num_workers=processes)


def test_a_picture_that_the_detector_refuses_is_named():
    strip = scene(image=PIL.Image.new("RGB", (3, 4000)), size=(4000, 3), image_id=77)
    with pytest.raises(ValueError, match=r"picture 77: images\[0\] has 4000 x 3 pixels"):
        evaluate_objects(detector(mask_rcnn).eval(), scene_source([strip], NAMES), device=CPU)


def test_ellipses_are_within_their_boxes():
    (mask,) = ellipses([(3, 5, 13, 9)], (20, 20))
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (5, 9, 3, 13)
