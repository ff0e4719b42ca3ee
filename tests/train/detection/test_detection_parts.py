"""The detection wing's parts: augmentation, sources, recipes, rates."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers.object_files import NARROW, TINY, rectangles, write_instances
from helpers.paths import ROOT

from d_emo.detection.saved import make_detector
from d_emo.images.coco import Scene, coco_objects
from d_emo.train.detection.augmentation import Augmentation, joined
from d_emo.train.detection.config import DetectionAugmentationOptions, parse_detector_config
from d_emo.train.detection.plan import make_detector_plan
from d_emo.train.detection.sources import load_sources

FOLDER = ROOT / "train" / "configs" / "detector"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
MEAN = (0.485, 0.456, 0.406)
COLOURS = np.array([(250, 40, 40), (40, 40, 250)])


def scene(seed=0, crowd=(False, False)):
    """Two rectangles; the picture says itself where they are and of which class."""
    picture, found = rectangles(seed)
    masks = np.zeros((2, picture.height, picture.width), dtype=bool)
    boxes = []
    for mask, ((x, y, width, height), _) in zip(masks, found, strict=True):
        mask[y : y + height, x : x + width] = True
        boxes.append((x, y, x + width, y + height))
    masks[0] &= ~masks[1]
    return Scene(
        image=picture,
        boxes=np.array(boxes, dtype=np.float32),
        labels=np.array([{3: 0, 17: 1}[category] for _, category in found]),
        masks=masks,
        crowd=np.array(crowd),
        areas=masks.sum(axis=(1, 2)).astype(np.float32),
        name="a",
        image_id=1,
    )


def augmentation(side=64, masks=True, seed=3, **options):
    return Augmentation(DetectionAugmentationOptions(**options), side, MEAN, masks, seed)


def test_an_augmented_scene_is_a_function_of_seed_and_position_alone():
    torch.manual_seed(1)
    first = [augmentation()(scene(), position) for position in range(8)]
    torch.manual_seed(2)
    again = [augmentation()(scene(), position) for position in reversed(range(8))][::-1]
    for (image, target), (other, same) in zip(first, again, strict=True):
        assert torch.equal(image, other) and all(torch.equal(target[name], same[name]) for name in target)
    assert len({image.numpy().tobytes() for image, _ in first}) == 8
    assert not torch.equal(first[0][0], augmentation(seed=4)(scene(), 0)[0])


def test_boxes_masks_and_classes_stay_on_their_objects():
    """Without changes of colour every mask's pixels have the class's colour, and its box encloses them."""
    augment, objects = augmentation(photometric=False), 0
    for position in range(40):
        image, target = augment(scene(position % 5), position)
        assert image.dtype == torch.uint8 and image.shape == (3, 64, 64)
        assert target["masks"].dtype == torch.bool and target["masks"].shape[1:] == (64, 64)
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            rows, columns = torch.where(mask)
            colour = image[:, rows, columns].double().median(dim=1).values
            assert torch.allclose(colour, torch.tensor(COLOURS[label]).double(), atol=60)
            left, top, right, bottom = box.tolist()
            assert left - 1 <= columns.min() and columns.max() + 1 <= right + 1
            assert top - 1 <= rows.min() and rows.max() + 1 <= bottom + 1
            objects += 1
    assert objects > 40


def test_crowds_are_not_learned_and_pictures_without_objects_are():
    one = augmentation(None)(scene(crowd=(True, False)), 0)[1]
    assert len(one["boxes"]) == 1 and one["masks"].shape[0] == 1
    none = augmentation()(scene(crowd=(True, True)), 0)[1]
    assert none["boxes"].shape == (0, 4) and none["masks"].shape == (0, 64, 64) and none["labels"].dtype == torch.int64
    batch = joined([(*augmentation(None)(scene(), position), position, []) for position in (4, 5)])
    assert batch.positions == [4, 5] and [image.shape for image in batch.images] == [(3, 64, 80)] * 2


def test_what_is_published_for_a_system_is_done_unless_it_is_switched_off():
    assert augmentation(320).describe() == "zoom out to 4, IoU crop, flip, photometric"
    assert augmentation(None).describe() == "flip"
    off = {"zoom_out": 1.0, "iou_crop": False, "photometric": False, "random_flip": False}
    still = augmentation(64, **off)
    assert still.describe() == "none"
    image, target = still(scene(), 0)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(np.array(scene().image)).permute(2, 0, 1)[None].float(), (64, 64), mode="bilinear"
    )[0]
    assert (image.float() - expected).abs().max() <= 1  # rounded to whole numbers
    assert torch.allclose(target["boxes"], torch.from_numpy(scene().boxes) * torch.tensor([0.8, 1, 0.8, 1]), atol=1e-4)
    plain, target = augmentation(None, **off)(scene(), 0)
    assert np.array_equal(plain.permute(1, 2, 0), scene().image) and target["boxes"].equal(
        torch.from_numpy(scene().boxes)
    )


def test_a_zoomed_out_picture_lies_on_the_mean():
    zoomed = [augmentation(None, zoom_out=3.0, random_flip=False)(scene(), position)[0] for position in range(12)]
    larger = [image for image in zoomed if image.shape[1] > 64]
    assert 2 <= len(larger) <= 10 and max(image.shape[1] for image in larger) <= 3 * 64
    corners = {tuple(image[:, row, column].tolist()) for image in larger for row in (0, -1) for column in (0, -1)}
    assert (124, 116, 104) in corners


def parsed(folder, *more):
    return parse_detector_config([*TINY, "--train-data-dir", str(folder), *more])


def test_pictures_are_dropped_held_out_and_counted_as_asked(tmp_path):
    folder = write_instances(tmp_path / "boxes", 10, empty=4)
    source, validation = load_sources(parsed(folder).data, masks=False)
    assert (
        source.size == 6 and validation is None and source.describe_size().startswith("6 images with 12 objects (of 10")
    )
    assert load_sources(parsed(folder, "--images-without-objects", "keep").data, False)[0].size == 10
    assert load_sources(parsed(folder, "--max-images", "2").data, False)[0].size == 2
    train, held = load_sources(parsed(folder, "--validation-share", "0.3").data, masks=False)
    assert held.size == 3 and held.name == "boxes, held out"
    names = [{part.read(index).name for index in range(part.size)} for part in (train, held)]
    assert not names[0] & names[1]
    with pytest.raises(ValueError, match="no image is left to train on"):
        load_sources(parsed(folder, "--min-image-side", "100").data, masks=False)


def test_validation_has_the_training_classes_whatever_their_order(tmp_path):
    train, other = write_instances(tmp_path / "train"), write_instances(tmp_path / "val", 4)
    path = other / "annotations.json"
    text = path.read_text()
    path.write_text(text.replace('"category_id": 17', '"category_id": 1').replace('"id": 17', '"id": 1'))
    source, validation = load_sources(parsed(train, "--validation-dir", str(other)).data, masks=True)
    assert validation.id2label == source.id2label == {0: "red", 1: "blue"}
    for index in range(4):
        assert np.array_equal(validation.read(index).labels, source.read(index).labels)
    path.write_text(text.replace('"blue"', '"green"'))
    with pytest.raises(ValueError, match=r"--validation-dir .*: it has classes that train, .* does not have: green"):
        load_sources(parsed(train, "--validation-dir", str(other)).data, masks=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures that are not read: their list says what the plan needs."""
    return write_instances(tmp_path_factory.mktemp("photos") / "boxes")


def plan_of(photos, *arguments):
    config = parse_detector_config([*arguments, "--train-data-dir", str(photos)])
    return make_detector_plan(config, coco_objects(photos, photos / "annotations.json"), None, Accelerator(cpu=True))


@pytest.mark.parametrize("name", RECIPES)
def test_the_trainer_makes_plan_optimizer_and_schedule_of_every_recipe(photos, name):
    given = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    small = ["--model-config", NARROW, "--model", "EMOv2-1M", "--micro-batch-size", "2"]
    plan = plan_of(photos, "--config", str(FOLDER / f"{name}.yaml"), *small)
    optimizer = plan.make_optimizer(model := plan.build_model())
    schedule = plan.make_schedule(optimizer)
    assert plan.layout.global_batch_size == given["global_batch_size"]
    assert optimizer.param_groups[0]["initial_lr"] == given["learning_rate"]
    assert schedule.get_last_lr()[0] <= given["learning_rate"]
    undecayed = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    named = {name for name, parameter in model.named_parameters() if id(parameter) in undecayed}
    assert named and all("norm" in name for name in named)
    assert any("stages.0.blocks.0.norm" in name for name in named)
    assert plan.system == given.get("system", "retinanet") and "frozen" in plan.describe()


def test_the_published_ssdlite_run_has_as_many_steps_as_its_log(photos):
    """3054 steps of 192 are five passes over the 117,266 images of COCO that have objects."""
    recipe = ["--config", str(FOLDER / "ssdlite.yaml"), "--model-config", NARROW, "--model", "EMOv2-1M"]
    config = parse_detector_config([*recipe, "--micro-batch-size", "2", "--train-data-dir", str(photos)])
    source = replace(coco_objects(photos, photos / "annotations.json"), size=117_266)
    plan = make_detector_plan(config, source, None, Accelerator(cpu=True))
    assert plan.max_train_steps == pytest.approx(120 * 3054, rel=1e-3) and plan.warmup_steps == 500
    schedule = plan.make_schedule(plan.make_optimizer(plan.build_model())).lr_lambdas[0]
    half = plan.max_train_steps // 2
    assert schedule(0) == pytest.approx(1e-5) and schedule(500) == schedule(half - 1) == 1
    # A quarter later the cosine is halfway down, to the pass in which it falls.
    assert schedule(half + half // 2) == pytest.approx(0.5, abs=0.006) and schedule(plan.max_train_steps - 1) < 1e-4


def test_sizes_and_systems_reach_the_detector(photos):
    small = ["--model-config", NARROW, "--model", "EMOv2-1M"]
    plan = plan_of(photos, *small, "--resolution", "96")
    assert plan.system == "retinanet" and plan.settings["options"]["min_size"] == 96
    assert plan.settings["options"]["max_size"] == 160 and plan.model_name == "EMOv2-1M-retinanet"
    plan = plan_of(photos, *TINY, "--detector-config", '{"score_thresh": 0.5}', "--frozen-stages", "2")
    model = plan.build_model()
    assert model.score_thresh == 0.5 and model.backbone.backbone.emov2.frozen_stages == 2
    assert model.backbone.backbone.emov2.stem.conv.weight.requires_grad is False
    with pytest.raises(ValueError, match="with one image at once; use a --micro-batch-size of 2 or more"):
        plan_of(photos, *TINY, "--micro-batch-size", "1")


def test_a_trained_detectors_folder_gives_system_and_name(photos, tmp_path):
    made = make_detector("ssdlite", "EMOv2-1M", ["a"], network={"widths": [8, 8, 16, 16], "head_dims": [8] * 4},
                         image_size=64)  # fmt: skip
    made.save_pretrained(tmp_path / "first")
    plan = plan_of(photos, "--init-from", str(tmp_path / "first"))
    assert plan.system == "ssdlite" and plan.model_name == "first-ssdlite" and plan.augmentation.side == 64
    own, new = made.model.state_dict(), plan.build_model().state_dict()
    same = [name for name in own if own[name].shape == new[name].shape]
    assert all(own[name].equal(new[name]) for name in same) and len(own) - len(same) == 12
    with pytest.raises(ValueError, match="is a detector ssdlite; leave out --system retinanet"):
        plan_of(photos, "--init-from", str(tmp_path / "first"), "--system", "retinanet")
