"""COCO's lists as people have them: what is read, what is left out, what is refused; masks against COCO's own code."""

import json
import shutil
import time

import numpy as np
import PIL.Image
import pytest
from helpers.object_files import instances, write_instances, write_panoptic
from helpers.paths import SHARED

from d_emo.images.coco import coco_objects, dataset_objects, find_annotations, some_of
from d_emo.images.coco_masks import mask_of_outline, pack, unpack
from d_emo.images.decode import UnreadableImageError
from d_emo.images.objects import refuse_unusable

COCO = SHARED / "data" / "dense" / "coco"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_instances(tmp_path_factory.mktemp("objects") / "boxes")


def opened(folder, tmp_path, change, **options):
    """The source of a changed list about the same pictures."""
    content, _ = instances()
    change(content)
    path = tmp_path / "list.json"
    path.write_text(json.dumps(content))
    return coco_objects(folder, path, **options)


def test_ids_with_gaps_become_labels_by_their_order_and_pictures_may_lie_in_sub_folders(pictures):
    source = coco_objects(pictures, find_annotations(pictures))
    content, images = instances()
    assert (source.name, source.size, source.id2label) == ("boxes", 8, {0: "red", 1: "blue"})
    assert source.describe_size() == "8 images with 16 objects" and source.has_masks
    for place, image in enumerate(images):
        scene = source.read(place)
        entries = [entry for entry in content["annotations"] if entry["image_id"] == 100 + 7 * place]
        assert scene.image_id == 100 + 7 * place and np.array_equal(scene.image, image)
        x, y, width, height = np.array([entry["bbox"] for entry in entries]).T
        assert (
            np.array_equal(scene.boxes, np.stack([x, y, x + width, y + height], 1)) and scene.boxes.dtype == "float32"
        )
        assert [{0: 3, 1: 17}[label] for label in scene.labels] == [entry["category_id"] for entry in entries]
        assert scene.masks.shape == (2, image.height, image.width) and not scene.crowd.any()
        for mask, (left, top, right, bottom) in zip(scene.masks, scene.boxes.astype(int), strict=True):
            assert mask[top:bottom, left:right].all() and mask.sum() == (right - left) * (bottom - top)


def test_what_is_no_object_is_left_out_and_counted(pictures, tmp_path):
    def change(content):
        content["categories"].append({"id": 90, "name": "unused"})
        first, second, third, fourth, fifth = content["annotations"][:5]
        first["bbox"] = [5, 5, 0, 10]
        second["bbox"] = [20, 20, -8.5, 9]
        third["bbox"] = [200, 10, 20, 20]
        fourth["bbox"] = [-4.5, 50.25, 30, 300]
        fifth["image_id"] = 5

    source = opened(pictures, tmp_path, change)
    assert source.describe_size() == (
        "8 images with 12 objects (left out: 1 objects of images that are not listed; 1 images without objects, 1 "
        "classes without objects; left out: 2 objects without an area, 1 objects outside of their pictures)"
    )
    assert len(source.read(0).boxes) == 0 and source.read(0).masks.shape == (0, 72, 64)
    assert source.read(1).boxes.tolist() == [[0, 50.25, 25.5, 64]]  # cut to the picture of 80 x 64


def test_crowds_are_kept_and_marked_and_areas_are_the_annotations(pictures, tmp_path):
    runs = {"size": [72, 64], "counts": [64 * 72 - 72 * 10, 72 * 10]}

    def change(content):
        content["annotations"][0].update(iscrowd=1, segmentation=runs, area=11.5)
        del content["annotations"][1]["area"]

    source = opened(pictures, tmp_path, change)
    scene = source.read(0)
    assert scene.crowd.tolist() == [True, False] and source.counts[0] == 1
    assert scene.masks[0][:, 54:].all() and not scene.masks[0][:, :54].any()
    assert scene.areas.tolist() == [11.5, scene.masks[1].sum()]


def test_names_that_several_categories_have_are_told_apart(pictures, tmp_path):
    source = opened(pictures, tmp_path, lambda content: content["categories"][0].update(name="red"))
    assert source.id2label == {0: "red (3)", 1: "red (17)"}


def test_a_list_without_masks_has_boxes_alone_and_one_with_some_loses_the_others(pictures, tmp_path):
    def without(content):
        for entry in content["annotations"]:
            entry["segmentation"] = []

    assert not (source := opened(pictures, tmp_path, without)).has_masks and source.read(0).masks is None
    some = opened(pictures, tmp_path, lambda content: content["annotations"][0].pop("segmentation"))
    assert some.has_masks and len(some.read(0).boxes) == 1 and "1 objects without a mask" in some.note
    assert opened(pictures, tmp_path, lambda c: c["annotations"][0].pop("segmentation"), masks=False).counts[0] == 2


def test_things_of_a_panoptic_list_are_the_same_objects(tmp_path):
    source = coco_objects(write_panoptic(tmp_path / "p"), tmp_path / "p" / "panoptic.json")
    plain = coco_objects(write_instances(tmp_path / "i"), tmp_path / "i" / "annotations.json")
    assert source.id2label == plain.id2label and source.has_masks
    for index in range(source.size):
        scene, other = source.read(index), plain.read(index)
        assert np.array_equal(scene.boxes, other.boxes) and np.array_equal(scene.labels, other.labels)
        # Of rectangles that cross, the later one has the pixels.
        assert np.array_equal(scene.masks[-1], other.masks[-1]) and (scene.masks[0] <= other.masks[0]).all()


@pytest.mark.parametrize("change", ["JPEG", "grey"])
def test_panoptic_pictures_whose_numbers_are_not_what_was_written_are_refused(tmp_path, change):
    path = write_panoptic(tmp_path) / "panoptic.json"
    source = coco_objects(tmp_path, path)
    first = sorted((tmp_path / "panoptic").glob("*.png"))[0]
    picture = PIL.Image.open(first)
    picture.load()
    picture.save(first, "JPEG", quality=100) if change == "JPEG" else picture.convert("L").save(first)
    with pytest.raises(UnreadableImageError, match="JPEG changes" if change == "JPEG" else "the mode L; COCO's"):
        source.read(0)


def test_outlines_and_runs_are_cocos_pixels():
    mask_api = pytest.importorskip("faster_coco_eval.core.mask")
    random = np.random.RandomState(0)
    for case in range(300):
        height, width = (int(side) for side in random.randint(3, 60, 2))
        reach = [0.7, 0.7, 30, 300][case % 4]  # in pictures' sides, from the middle
        corners = (random.uniform(-reach, reach, (random.randint(3, 9), 2)) + 0.5) * [width, height]
        corners = np.round(corners) if case % 3 == 0 else corners
        outline = (np.concatenate([corners, corners[-1:]]) if case % 5 == 0 else corners).flatten().tolist()
        drawn = mask_api.frPyObjects([outline], height, width)
        expected = mask_api.decode(mask_api.merge(drawn)).astype(bool)
        assert np.array_equal(mask_of_outline(outline, height, width), expected)
        text = mask_api.encode(np.asfortranarray(expected.astype(np.uint8)))["counts"]
        runs = {"size": [height, width], "counts": text if isinstance(text, str) else text.decode()}
        assert np.array_equal(unpack(pack(runs, (width, height)), height, width), expected)


def test_corners_far_outside_cost_nothing():
    triangle = [-900_000, -900_000, 900_000, 900_000, -900_000, 900_000] * 200
    mask, near = mask_of_outline(triangle[:6], 6, 8), mask_of_outline([-9, -9, 9, 9, -9, 9], 6, 8)
    assert np.array_equal(mask, near) and 0 < mask.sum() < mask.size
    started = time.perf_counter()
    mask_of_outline(triangle, 480, 640)
    assert time.perf_counter() - started < 2  # 3.6 billion points of the grid lie on its edges


def test_edges_that_cross_too_many_columns_are_refused():
    with pytest.raises(ValueError, match="cross columns 20,040,000 times; at most 20,000,000 are drawn"):
        mask_of_outline([0, 0, 20_000, 5] * 501, 2, 20_000)


BAD_MASKS = {
    "runs of too few": ({"size": [72, 64], "counts": [10, 20]}, "its mask's counts are 30 pixels, not 4,608"),
    "runs of another size": ({"size": [64, 72], "counts": [4608]}, "its mask is of 72 x 64 pixels, the picture of 64"),
    "negative runs": ({"size": [72, 64], "counts": [-4, 4612]}, "no lengths of runs"),
    "a cut text": ({"size": [72, 64], "counts": "o"}, "cut short"),
    "a long number": ({"size": [72, 64], "counts": "o" * 40 + "0"}, "its mask's counts are damaged"),
    "foreign letters": ({"size": [72, 64], "counts": "é!"}, "its mask's counts are damaged"),
    "no counts": ({"size": [72, 64]}, "no lengths of runs"),
    "no size": ({"counts": [4608]}, "no size [height, width]"),
    "an odd outline": ([[1, 2, 3, 4, 5]], "no list of x, y, x, y"),
    "far corners": ([[1, 2, 3, 4, 5, 1e300]], "no place in a picture"),
    "words": ("mask", "neither a list of outlines nor runs"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_damaged_masks_are_named_with_their_annotation(pictures, tmp_path, case):
    shape, message = BAD_MASKS[case]
    with pytest.raises(ValueError, match=r"list\.json: the annotation 1: ") as caught:
        opened(pictures, tmp_path, lambda content: content["annotations"][0].update(segmentation=shape))
    assert message in str(caught.value) and "\n" not in str(caught.value)


BAD_LISTS = {
    "no categories": (lambda c: c.pop("categories"), "it has no list 'categories'"),
    "no images": (lambda c: c["images"].clear(), "its list 'images' is empty"),
    "no annotations": (lambda c: c["annotations"].clear(), "its list 'annotations' is empty"),
    "words for images": (lambda c: c["images"].append("a"), "it has no list 'images'"),
    "a missing picture": (lambda c: c["images"][2].update(file_name="x.png"), "it names x.png, which is not in"),
    "a name that leads out": (lambda c: c["images"][2].update(file_name="../x.png"), "leads out of"),
    "an absolute name": (lambda c: c["images"][2].update(file_name="/etc/x.png"), "leads out of"),
    "no name": (lambda c: c["images"][2].pop("file_name"), "the image 114 has no file_name"),
    "the same id twice": (lambda c: c["images"][2].update(id=100), "two images have the id 100"),
    "the same category twice": (lambda c: c["categories"][0].update(id=3), "two categories have the same id"),
    "an id of words": (lambda c: c["images"][2].update(id="a"), "an image has the id 'a'"),
    "a category that is not there": (
        lambda c: c["annotations"][4].update(category_id=5),
        "has the category 5, which is",
    ),
    "a nameless category": (lambda c: c["categories"][0].pop("name"), "the category 17 has no name"),
    "three numbers": (lambda c: c["annotations"][4].update(bbox=[1, 2, 3]), "annotation 5 has no bbox of four"),
    "no box": (lambda c: c["annotations"][4].pop("bbox"), "annotation 5 has no bbox of four numbers"),
    "a box that is not finite": (lambda c: c["annotations"][4].update(bbox=[1, 2, 3, float("nan")]), "not finite"),
    "a crowd of words": (lambda c: c["annotations"][4].update(iscrowd="yes"), "iscrowd 'yes'"),
    "a strange side": (lambda c: c["images"][1].update(width=-3), "the width or height -3"),
    "shares": (lambda c: [e.update(bbox=[0.1, 0.1, 0.5, 0.5]) for e in c["annotations"]], "they are shares"),
    "corners": (
        lambda c: [e.update(bbox=[30, 30, 60, 60]) for e in c["annotations"]],
        "fit as corners x1, y1, x2, y2",
    ),
    "nothing left": (lambda c: [e.update(bbox=[1, 5, 0, 0]) for e in c["annotations"]], "no object is left"),
    "nothing known": (
        lambda c: [e.update(image_id=1) for e in c["annotations"]],
        "no object is left (left out: 16 objects of images that are not listed)",
    ),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_lists_that_are_none_of_cocos_are_refused_in_one_line(pictures, tmp_path, case):
    change, message = BAD_LISTS[case]
    with pytest.raises(ValueError, match=r"list\.json: ") as caught:
        opened(pictures, tmp_path, change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


BEGINNINGS = {
    "another machine's": "/home/anna/set/{}",
    "Windows'": "C:\\data\\set\\{}",
    "an address": "https://example.org/files/{}",
    "relative ones": "../../label-studio/upload/{}",
    "the folder's own": "boxes/{}",
}


@pytest.mark.parametrize("case", BEGINNINGS)
def test_what_all_names_begin_with_on_another_machine_is_passed_over_and_said(pictures, tmp_path, capsys, case):
    def change(content):
        for entry in content["images"]:
            entry["file_name"] = BEGINNINGS[case].format(entry["file_name"])

    source, plain = opened(pictures, tmp_path, change), coco_objects(pictures, pictures / "annotations.json")
    assert "file_names are read without what they begin with" in capsys.readouterr().out
    for index in range(source.size):
        assert np.array_equal(source.read(index).image, plain.read(index).image)


def test_names_that_are_told_apart_by_what_would_be_passed_over_are_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"several of its file_names mean .*0\.png"):
        opened(pictures, tmp_path, lambda c: [e.update(file_name=f"{i}/0.png") for i, e in enumerate(c["images"])])


@pytest.mark.parametrize(("folder", "named"), [("images", "."), ("data", "."), ("images", "images"), ("new", "new")])
def test_lists_lie_where_tools_leave_them(pictures, tmp_path, folder, named):
    """CVAT's and COCO's `annotations` beside the pictures; FiftyOne's `data`."""
    shutil.copytree(pictures, tmp_path / folder)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_new.json").write_text("{}")
    (tmp_path / folder / "annotations.json").rename(tmp_path / "annotations" / "instances_new.json")
    (tmp_path / "annotations" / "instances_old.json").write_text("{}")
    if folder != "new":
        with pytest.raises(ValueError, match=r"2 JSON files \(instances_new\.json, instances_old\.json\)"):
            find_annotations(tmp_path / named)
        (tmp_path / "annotations" / "instances_old.json").unlink()
    found = find_annotations(tmp_path / named)
    assert found.name == "instances_new.json" and coco_objects(tmp_path / named, found).size == 8


def test_a_picture_that_is_listed_for_every_object_has_them_all(pictures, tmp_path):
    def change(content):
        content["images"].insert(0, {**content["images"][0], "id": 5})
        content["annotations"][1]["image_id"] = 5

    source, plain = opened(pictures, tmp_path, change), coco_objects(pictures, pictures / "annotations.json")
    assert source.size == 8 and "1 images are listed again, whose objects count for the first" in source.note
    for index in range(8):
        assert np.array_equal(source.read(index).boxes, plain.read(index).boxes)


def test_ids_of_annotations_and_sides_of_0_need_not_be_told(pictures, tmp_path):
    def change(content):
        for place, entry in enumerate(content["annotations"]):
            entry.update(id=f"a-{place}") if place % 2 else entry.pop("id")
        for entry in content["images"]:
            entry.update(width=0, height=0.0)

    source = opened(pictures, tmp_path, change)
    assert source.counts.sum() == 16 and source.sides.max() == 0 and len(source.read(1).boxes) == 2


def test_numbers_beyond_all_floats_are_no_box_and_no_area(pictures, tmp_path):
    assert opened(pictures, tmp_path, lambda c: c["annotations"][0].update(area=10**400)).counts.sum() == 16
    with pytest.raises(ValueError, match=r"list\.json: object 5 has the box \[1\.0, 2\.0, inf, .*not finite"):
        opened(pictures, tmp_path, lambda c: c["annotations"][4].update(bbox=[1, 2, 10**400, 3]))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_of_windows_is_read(pictures, tmp_path, encoding):
    content, _ = instances()
    (tmp_path / "list.json").write_text(json.dumps(content), encoding=encoding)
    assert coco_objects(pictures, tmp_path / "list.json").size == 8


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"images": [', "[" * 100_000, "\0\0"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match=r"list\.json is damaged .*; copy or export it again"):
        coco_objects(tmp_path, tmp_path / "list.json")


def test_pictures_of_another_size_and_unreadable_ones_are_named(tmp_path):
    folder = write_instances(tmp_path / "boxes")
    PIL.Image.new("RGB", (64, 80)).save(folder / "sub" / "1.png")
    (folder / "2.png").write_bytes(b"no picture")
    source = coco_objects(folder, folder / "annotations.json")
    with pytest.raises(
        UnreadableImageError, match=r"1\.png has 64 x 80 pixels, and its annotations say 80 x 64, it is"
    ):
        source.read(1)
    with pytest.raises(UnreadableImageError, match=r"2\.png cannot be read"):
        source.read(2)
    said = r"1\.png has 64 x 80 pixels, and its annotations say 80 x 64, it is .*, and 1 more\. Repair them\.$"
    with pytest.raises(UnreadableImageError, match=said):
        refuse_unusable(source, "Repair them.")
    with pytest.raises(UnreadableImageError, match=r"2\.png cannot be read \([^)]*\)\. Repair them\.$"):
        refuse_unusable(some_of(source, np.array([0, 2, 3])), "Repair them.")
    refuse_unusable(some_of(source, np.array([0, 3])), "Repair them.")


def test_sides_that_the_list_does_not_tell_are_the_pictures(pictures, tmp_path):
    def change(content):
        for entry in content["images"]:
            del entry["width"], entry["height"]
        content["annotations"][0]["bbox"] = [60, 60, 100, 100]
        content["annotations"][1]["bbox"] = [90, 90, 10, 10]

    scene = opened(pictures, tmp_path, change, masks=False).read(0)
    assert scene.boxes.tolist() == [[60, 60, 64, 72]] and scene.areas[0] > 0


def test_some_pictures_of_a_source_keep_its_classes_and_have_another_fingerprint(pictures):
    source = coco_objects(pictures, pictures / "annotations.json")
    part = some_of(source, np.array([5, 1]), "two")
    assert part.size == 2 and part.read(0).name == source.read(5).name and part.name == "two"
    assert part.identity()["data_fingerprint"] != source.fingerprint
    assert np.array_equal(part.counts, source.counts[[5, 1]]) and part.id2label == source.id2label


@pytest.mark.parametrize("layout", ["tables", "lists"])
@pytest.mark.parametrize("form", ["xywh", "xyxy"])
def test_the_hubs_layouts_of_objects_are_read(tmp_path, layout, form):
    import datasets

    content, images = instances()
    rows = []
    for place, picture in enumerate(images):
        found = []
        for entry in content["annotations"]:
            if entry["image_id"] == 100 + 7 * place:
                x, y, width, height = entry["bbox"]
                box = [x, y, width, height] if form == "xywh" else [x, y, x + width, y + height]
                found.append({"bbox": [float(side) for side in box], "category": entry["category_id"] // 17})
        rows.append({"image": picture, "objects": found})
    one = {"bbox": datasets.Sequence(datasets.Value("float32")), "category": datasets.ClassLabel(names=["red", "blue"])}
    objects = [one] if layout == "tables" else datasets.Sequence(one)
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    if layout == "lists":
        rows = [{**row, "objects": {key: [o[key] for o in row["objects"]] for key in one}} for row in rows]
    path = tmp_path / "boxes.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    source = dataset_objects(str(path), box_format=form)
    plain = coco_objects(write_instances(tmp_path / "i"), tmp_path / "i" / "annotations.json")
    assert source.id2label == plain.id2label and not source.has_masks and source.size == 8
    for index in range(8):
        scene, other = source.read(index), plain.read(index)
        assert np.array_equal(scene.boxes, other.boxes) and np.array_equal(scene.labels, other.labels)
    for column, message in (("image", "has no table; an object has bbox"), ("things", "no column 'things' among")):
        with pytest.raises(ValueError, match=message):
            dataset_objects(str(path), objects_column=column)


@pytest.mark.skipif(not COCO.is_dir(), reason="needs shared/data/dense/coco")
def test_cocos_own_pictures_have_masks_that_fill_their_boxes():
    source = coco_objects(COCO / "val" / "images", COCO / "val" / "panoptic.json")
    assert source.size == 27 and len(source.id2label) == 80 and source.name == "val"
    assert int(source.counts.sum()) == 172
    for index in range(3):
        scene = source.read(index)
        for mask, box in zip(scene.masks, scene.boxes, strict=True):
            rows, columns = np.nonzero(mask)
            bounds = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.array(bounds) - box).max() <= 1
