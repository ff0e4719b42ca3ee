"""Masks as people have them: layouts of folders, kinds of files, and what is refused."""

import numpy as np
import PIL.Image
import pytest
from helpers.masks import COLORS, blocks, picture_of, write_masks

from d_emo.images.decode import UnreadableImageError
from d_emo.images.mask_files import decode_mask, read_palette
from d_emo.images.masks import MaskOptions, folder_masks, open_masks
from d_emo.images.pixels import held_out_pixels, pixel_subset


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def grey(labels, dtype=np.uint8):
    return PIL.Image.fromarray(labels.astype(dtype))


def with_palette(labels):
    picture = PIL.Image.frombytes("P", labels.shape[::-1], labels.tobytes())
    picture.putpalette([int(value) for color in COLORS for value in color])
    return picture


KINDS = {
    "grey": lambda labels: grey(labels),
    "palette": with_palette,
    "16 bits": lambda labels: grey(labels, np.uint16),
    "grey and alpha": lambda labels: PIL.Image.merge("LA", (grey(labels), PIL.Image.new("L", labels.shape[::-1], 255))),
    "grey as colours": lambda labels: PIL.Image.merge("RGB", [grey(labels)] * 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_read_as_they_are_stored(kind, tmp_path):
    labels = blocks()
    path = save(tmp_path / "mask.png", KINDS[kind](labels))
    found = decode_mask(path, "mask")
    assert found.dtype == np.int32 and np.array_equal(found, labels)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_one_bit_is_zero_and_one(suffix, tmp_path):
    labels = blocks(classes=2)
    path = save(tmp_path / f"mask.{suffix}", PIL.Image.fromarray(labels.astype(bool)))
    assert PIL.Image.open(path).mode == "1" and np.array_equal(decode_mask(path, "mask"), labels)


def test_a_mask_is_turned_upright_as_its_picture_is(tmp_path):
    labels, exif = blocks(), PIL.Image.Exif()
    exif[274] = 6  # a quarter turn
    grey(labels).save(tmp_path / "mask.png", exif=exif)
    assert np.array_equal(decode_mask(tmp_path / "mask.png", "mask"), np.rot90(labels, -1))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (lambda: picture_of(blocks()), "colours, not class ids.*--palette"),
        (lambda: PIL.Image.new("CMYK", (4, 4)), "mode CMYK"),
        (lambda: PIL.Image.new("F", (4, 4)), "mode F"),
        (lambda: PIL.Image.new("LA", (4, 4), (1, 128)), "partly transparent"),
        (lambda: PIL.Image.fromarray(np.full((4, 4), -3, dtype=np.int32)), "holds -3"),
    ],
)  # fmt: skip
def test_what_holds_no_ids_is_refused(picture, message, tmp_path):
    with pytest.raises(UnreadableImageError, match=f"my mask cannot be read.*{message}"):
        decode_mask(save(tmp_path / "mask.tif", picture()), "my mask")


def test_jpeg_is_refused_since_it_changes_ids(tmp_path):
    with pytest.raises(UnreadableImageError, match="JPEG changes"):
        decode_mask(save(tmp_path / "mask.jpg", grey(blocks())), "mask")


def test_colours_become_classes_by_a_palette_file(tmp_path):
    labels = blocks()
    labels[10:12] = 2
    (tmp_path / "palette.txt").write_text("30 60 90 ground\n40 200 40 ignored\n\n200, 40, 40  red tile\n")
    palette = read_palette(tmp_path / "palette.txt")
    path = save(tmp_path / "mask.png", picture_of(labels))
    expected = np.array([0, 1, 255])[labels]
    assert palette.names == ["ground", "red tile"]
    assert np.array_equal(decode_mask(path, "mask", palette), expected)
    picture = picture_of(labels)
    picture.putpixel((0, 0), (1, 2, 3))
    with pytest.raises(UnreadableImageError, match=r"colour 1 2 3, 1 pixels"):
        decode_mask(save(tmp_path / "odd.png", picture), "mask", palette)


@pytest.mark.parametrize("mode", ["P", "L", "1", "RGBA", "LA"])
def test_a_palette_file_counts_however_a_picture_stores_its_colours(mode, tmp_path):
    """Programs that make PNG smaller store few colours by a palette of their own, in any order, and greys as grey."""
    labels = blocks(classes=2)
    greys = mode in ("L", "1", "LA")
    (tmp_path / "palette.txt").write_text("0 0 0 a\n255 255 255 b\n" if greys else "30 60 90 a\n200 40 40 b\n")
    picture = grey(255 * labels) if greys else picture_of(labels)
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    path = save(tmp_path / "mask.png", picture)
    assert PIL.Image.open(path).mode == mode
    assert np.array_equal(decode_mask(path, "mask", read_palette(tmp_path / "palette.txt")), labels)


@pytest.mark.parametrize("other", ["palette", "panoptic_json"])
@pytest.mark.parametrize("options", [{"reduce_zero_label": True}, {"ignore_index": 0}])
def test_what_is_said_of_plain_numbers_is_refused_of_other_masks(other, options, tmp_path):
    with pytest.raises(ValueError, match=r"(--reduce-zero-label|--ignore-index) is of masks of plain numbers"):
        open_masks(str(write_masks(tmp_path)), None, **{other: "none.txt"}, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2", "line 1"),
        ("1 2 300 a", "line 1"),
        ("1 2 3 a\n1 2 3 b", "line 2 repeats the colour 1 2 3"),
        ("1 2 3 a\n1 2 4 a", "line 2 repeats the name 'a'"),
        ("1 2 3 a\n1 2 4", "class 1 has no name"),
        ("", "0 colours"),
        ("1 2 3 a\nname", "line 2"),
        ("road", "line 1 is 'road'"),
    ],
)
def test_palette_files_that_are_none(text, message, tmp_path):
    (tmp_path / "palette.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_palette(tmp_path / "palette.txt")


@pytest.mark.parametrize(
    "text",
    [
        "name,r,g,b\nground,30,60,90\nred tile,200,40,40\n",
        "# label:color_rgb:parts:actions\nground:30,60,90::\nred tile:200,40,40:wheel,door:\n",
        "ground 30 60 90\nred tile\t200 40 40",
        "R G B\n30 60 90\t\tground\n200 40 40\tred tile",
    ],
)
def test_palette_files_of_usual_tools_are_read_as_they_are(text, tmp_path):
    (tmp_path / "palette.txt").write_text(text)
    palette = read_palette(tmp_path / "palette.txt")
    assert palette.names == ["ground", "red tile"]
    labels = blocks(classes=2)
    assert np.array_equal(decode_mask(save(tmp_path / "mask.png", picture_of(labels)), "mask", palette), labels)


def check_pairs(source, names, classes=3):
    """Every picture's colours are its labels'."""
    assert [key.rsplit(".", 1)[0] for key in source.keys] == names and len(source.id2label) == classes
    for index in range(source.size):
        sample = source.read(index)
        assert sample.image.mode == "RGB" and sample.labels.dtype == np.int32
        assert np.array_equal(np.array(sample.image), COLORS[sample.labels])


def test_images_and_masks_beside_each_other(tmp_path):
    root = write_masks(tmp_path / "set")
    for images, masks in ((root, None), (root / "images", None), (root / "images", root / "masks"),
                          (root, root / "masks")):  # fmt: skip
        source = folder_masks(images, masks)
        check_pairs(source, ["a", "b", "c", "d"])
        assert source.name == "set" and source.id2label == {0: "0", 1: "1", 2: "2"}
        assert source.describe_size() == "4 images" and source.stream is None


def nested(root, image, mask):
    for seed, city in enumerate(("aachen", "bremen")):
        labels = blocks(seed)
        save(root / image.format(city), picture_of(labels))
        save(root / mask.format(city), grey(labels))


def test_nested_folders_with_suffixes_as_cityscapes_has_them(tmp_path):
    for part in ("train", "val"):
        nested(tmp_path, f"leftImg8bit/{part}/{{0}}/{{0}}_1_leftImg8bit.png",
               f"gtFine/{part}/{{0}}/{{0}}_1_gtFine_labelTrainIds.png")  # fmt: skip
        nested(tmp_path, f"leftImg8bit/{part}/{{0}}/{{0}}_1_leftImg8bit.png",
               f"gtFine/{part}/{{0}}/{{0}}_1_gtFine_color.png")  # fmt: skip
    source = folder_masks(
        tmp_path / "leftImg8bit" / "train", image_suffix="_leftImg8bit", mask_suffix="_gtFine_labelTrainIds"
    )
    check_pairs(source, ["aachen/aachen_1_leftImg8bit", "bremen/bremen_1_leftImg8bit"])
    assert "2 masks by their names" in source.note
    with pytest.raises(ValueError, match=r"train and val, which are parts.*leftImg8bit/train"):
        folder_masks(tmp_path, image_suffix="_leftImg8bit", mask_suffix="_gtFine_labelTrainIds")


def test_ade20ks_folders_and_its_zero_that_is_no_class(tmp_path):
    for seed in range(2):
        labels = blocks(seed)
        save(tmp_path / "images" / "training" / f"{seed}.jpg", picture_of(labels))
        save(tmp_path / "annotations" / "training" / f"{seed}.png", grey(labels))
    source = folder_masks(tmp_path / "images" / "training", options=MaskOptions(reduce_zero_label=True))
    assert source.id2label == {0: "0", 1: "1"}
    assert np.array_equal(source.read(1).labels, np.array([255, 0, 1])[blocks(1)])


def test_the_masks_ending_is_told_by_the_names(tmp_path):
    nested(tmp_path, "images/{0}.jpg", "masks/{0}_1stHO.png")
    assert folder_masks(tmp_path).size == 2
    nested(tmp_path, "images/{0}.jpg", "masks/{0}_2ndHO.png")
    with pytest.raises(ValueError, match=r"end with _1stHO or _2ndHO; choose: --mask-suffix"):
        folder_masks(tmp_path)
    assert folder_masks(tmp_path, mask_suffix="_2ndHO").size == 2


def test_the_pictures_ending_is_told_by_the_names(tmp_path):
    nested(tmp_path, "leftImg8bit/{0}_1_leftImg8bit.png", "gtFine/{0}_1_gtFine_color.png")
    assert folder_masks(tmp_path).size == 2
    nested(tmp_path, "leftImg8bit/{0}_1_leftImg8bit.png", "gtFine/{0}_1_gtFine_labelIds.png")
    with pytest.raises(ValueError, match="_gtFine_color or _gtFine_labelIds; choose: --mask-suffix"):
        folder_masks(tmp_path)
    check_pairs(
        folder_masks(tmp_path, mask_suffix="_gtFine_labelIds"), ["aachen_1_leftImg8bit", "bremen_1_leftImg8bit"]
    )


def test_what_numbers_end_with_is_no_ending(tmp_path):
    """Else the only picture, "scan_2", would have the mask of "scan"."""
    save(tmp_path / "images" / "scan_2.png", picture_of(blocks()))
    save(tmp_path / "masks" / "scan.png", grey(blocks()))
    with pytest.raises(ValueError, match=r"scan_2\.png: 1 file is without a mask"):
        folder_masks(tmp_path)


def test_pictures_and_masks_in_one_folder(tmp_path):
    nested(tmp_path, "{0}.png", "{0}_mask.png")
    with pytest.raises(ValueError, match="--mask-suffix"):
        folder_masks(tmp_path, tmp_path)
    for masks in (tmp_path, None):
        check_pairs(folder_masks(tmp_path, masks, mask_suffix="_mask"), ["aachen", "bremen"])


def test_a_folder_of_other_files_is_none_of_masks(tmp_path):
    """VOC has `Annotations` of XML beside `SegmentationClass`."""
    nested(tmp_path, "JPEGImages/{0}.png", "SegmentationClass/{0}.png")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "aachen.xml").write_text("<annotation/>")
    check_pairs(folder_masks(tmp_path), ["aachen", "bremen"])
    check_pairs(folder_masks(tmp_path / "JPEGImages"), ["aachen", "bremen"])


def test_parts_of_a_set_with_folders_of_masks_in_them_are_named_the_training_one_first(tmp_path):
    for part in ("test", "train"):
        write_masks(tmp_path / part)
    with pytest.raises(ValueError, match=r"holds train and test, which are parts .*; name one of them: .*/train\.$"):
        folder_masks(tmp_path)


def test_pictures_without_a_mask_are_left_out_and_counted_where_that_is_asked_for(tmp_path):
    """VOC has masks for one picture of six."""
    write_masks(tmp_path)
    for name in "ac":
        (tmp_path / "masks" / f"{name}.png").unlink()
    with pytest.raises(ValueError, match=r"2 files are without a mask; .* \(--images-without-masks drop\)"):
        folder_masks(tmp_path)
    source = folder_masks(tmp_path, without_masks="drop")
    check_pairs(source, ["b", "d"])
    assert source.describe_size() == "2 images (left out: 2 pictures without a mask)"
    for path in (tmp_path / "masks").iterdir():  # names that fit nowhere are no reason to leave all out
        path.rename(path.with_stem(f"{path.stem}x7"))
    with pytest.raises(ValueError, match="4 files are without a mask"):
        folder_masks(tmp_path, mask_suffix="", without_masks="drop")


def test_masks_that_all_cannot_be_read_say_why(tmp_path):
    nested(tmp_path, "images/{0}.png", "masks/{0}.jpg")
    with pytest.raises(ValueError, match=r"none of its 2 masks .*aachen\.jpg cannot be read \(JPEG changes"):
        folder_masks(tmp_path)


def test_files_that_are_no_pictures_are_counted_where_masks_are_missing(tmp_path):
    save(tmp_path / "images" / "a.png", picture_of(blocks()))
    (tmp_path / "masks").mkdir()
    np.save(tmp_path / "masks" / "a.npy", blocks())
    with pytest.raises(ValueError, match=r"a\.png: 1 file is without a mask; .*masks \(left out: 1 \.npy\)"):
        folder_masks(tmp_path)


def own_palette(labels, order):
    """A picture of the colours of `picture_of`, whose palette has them in another order."""
    picture = PIL.Image.fromarray(np.argsort(order)[labels].astype(np.uint8), mode="P")
    picture.putpalette([int(value) for number in order for value in COLORS[number]])
    return picture


def test_palettes_in_different_orders_are_refused_and_others_are_not(tmp_path):
    """Programs that make PNG or GIF smaller give every file a palette of its own."""
    for name, seed, order in (("a", 0, [0, 1, 2]), ("b", 1, [2, 0, 1])):
        save(tmp_path / "images" / f"{name}.png", picture_of(blocks(seed)))
        save(tmp_path / "masks" / f"{name}.png", own_palette(blocks(seed), order))
    with pytest.raises(ValueError, match=r"masks/b\.png and . in .*a\.png: every file has a palette .* --palette FILE"):
        folder_masks(tmp_path)
    # Another palette for the same numbers, or two numbers of one colour, say nothing.
    for colors in (COLORS[::-1] // 3, COLORS[[0, 1, 1]]):
        picture = own_palette(blocks(1), [0, 1, 2])
        picture.putpalette([int(value) for value in colors.flat])
        save(tmp_path / "masks" / "b.png", picture)
        assert np.array_equal(folder_masks(tmp_path).read(1).labels, blocks(1))


def test_white_of_16_bits_is_white(tmp_path):
    write_masks(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        grey(65535 * (np.array(PIL.Image.open(path)) > 0), np.uint16).save(path)
    source = folder_masks(tmp_path)
    assert source.id2label == {0: "background", 1: "object"} and source.binary is True
    assert np.array_equal(source.read(0).labels, blocks() > 0)


def test_masks_of_0_and_255_have_two_classes(tmp_path):
    write_masks(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        grey(255 * (np.array(PIL.Image.open(path)) > 0)).save(path.with_suffix(".tif"))
        path.unlink()
    source = folder_masks(tmp_path)
    assert source.id2label == {0: "background", 1: "object"} and source.binary is True
    assert np.array_equal(source.read(0).labels, blocks() > 0)
    named = folder_masks(tmp_path, options=MaskOptions(class_names=["other", "vessel"]))
    assert named.id2label[1] == "vessel" and np.array_equal(named.read(0).labels, blocks() > 0)
    ignoring = folder_masks(tmp_path, options=MaskOptions(class_names=["other", "vessel"], ignore_index=255))
    assert np.array_equal(ignoring.read(0).labels, 255 * (blocks() > 0))


def test_255_is_ignored_where_there_are_other_ids(tmp_path):
    write_masks(tmp_path, ["a"])
    labels = blocks()
    labels[5:9] = 255
    grey(labels).save(tmp_path / "masks" / "a.png")
    source = folder_masks(tmp_path)
    assert source.binary is False and np.array_equal(source.read(0).labels, labels)
    # Masks to validate on that show nothing but 0 and 255 are not taken for another kind.
    names = ["a", "b"]
    only = write_masks(tmp_path / "only", ["a"])
    grey(np.where(labels == 255, 255, 0)).save(only / "masks" / "a.png")
    assert folder_masks(only, options=MaskOptions(class_names=names, binary=None)).binary is True
    assert (folder_masks(only, options=MaskOptions(class_names=names, binary=False)).read(0).labels != 1).all()


def test_masks_to_validate_on_mean_255_as_those_to_train_on_although_it_was_not_seen_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr("d_emo.images.pixels.SURVEYED", 2)
    write_masks(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        grey(np.where(blocks() > 0, 255, 0) if path.stem == "b" else 0 * blocks()).save(path)
    options = MaskOptions(class_names=["ground", "defect"], binary=True)
    assert np.array_equal(folder_masks(tmp_path, options=options).read(1).labels, blocks() > 0)


def test_an_own_number_that_is_no_class(tmp_path):
    write_masks(tmp_path, ["a"])
    labels = blocks()
    source = folder_masks(tmp_path, options=MaskOptions(class_names=["x", "y"], ignore_index=2))
    assert np.array_equal(source.read(0).labels, np.array([0, 1, 255])[labels])


def break_masks(root, change):
    path = root / "masks" / "b.png"
    labels = np.array(PIL.Image.open(path))
    grey(change(labels)).save(path)
    return root


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda r: break_masks(r, lambda m: m[:-1]), {},
         r"b\.png has 48 x 39 pixels, and its picture .*b\.png 48 x 40"),
        (lambda r: break_masks(r, lambda m: np.where(m == 2, 7, m)), {"class_names": ["x", "y", "z"]},
         r"masks/b\.png holds 7, which is no class: they are 0 to 2, and 255 is ignored"),
        (lambda r: break_masks(r, lambda m: np.where(m == 2, 7, m)), {},
         r"hold 0, 1, 2, 7, but not 3.*--class-names"),
        (lambda r: (r / "masks" / "c.png").unlink(), {}, r"images/c\.png: 1 file is without a mask; c\.png"),
        (lambda r: [(r / "masks" / f"{n}.png").unlink() for n in "ac"], {}, r"a\.png, .*c\.png: 2 files are without"),
        (lambda r: (r / "images" / "c.png").unlink(), {}, r"masks/c\.png: 1 file is without a picture"),
        (lambda r: [p.unlink() for p in (r / "images").iterdir()], {}, "there are no pictures in"),
        (lambda r: grey(blocks()).save(r / "masks" / "a.tif"), {}, r"a\.(png|tif).*same name"),
        (lambda r: (r / "masks").rename(r / "other"), {}, "no folder of masks.*--mask-dir"),
        (lambda r: save(r / "labels" / "a.png", grey(blocks())), {}, r"labels and .*masks; choose: --mask-dir"),
        (lambda r: [break_one(p, 255) for p in (r / "masks").iterdir()], {"ignore_index": 255},
         "no pixel of its masks has a class"),
    ],
)  # fmt: skip
def test_a_set_that_does_not_go_together_is_refused(prepare, options, message, tmp_path):
    root = write_masks(tmp_path / "set")
    prepare(root)
    with pytest.raises(ValueError, match=message):
        folder_masks(root, options=MaskOptions(**options))


def break_one(path, number):
    grey(np.full((40, 48), number)).save(path)


def test_a_number_that_was_not_seen_at_first_is_told_where_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("d_emo.images.pixels.SURVEYED", 2)
    root = write_masks(tmp_path / "set")
    break_masks(root, lambda labels: np.where(labels == 2, 9, labels))
    source = folder_masks(root, options=MaskOptions(class_names=["x", "y", "z"]))
    source.read(0)
    with pytest.raises(UnreadableImageError, match=r"b\.png holds 9"):
        source.read(1)


def test_damaged_files_are_known_before_they_are_read(tmp_path):
    root = write_masks(tmp_path / "set")
    (root / "masks" / "a.png").write_bytes(b"no picture")
    (root / "images" / "b.png").write_bytes(b"no picture")
    source = folder_masks(root)
    assert (
        [*source.damaged] == [0, 1]
        and [*pixel_subset(source, [3, 1]).damaged] == [1]
        and "masks/a.png cannot be read" in source.unreadable[0]
    )
    with pytest.raises(UnreadableImageError, match=r"a\.png cannot be read"):
        source.read(0)


def test_names_from_a_file_and_the_same_classes_to_validate_on(tmp_path):
    root = write_masks(tmp_path / "set")
    (tmp_path / "names.txt").write_text("ground\nred\ngreen\n")
    source = open_masks(str(root), None, class_names=str(tmp_path / "names.txt"))
    assert source.id2label == {0: "ground", 1: "red", 2: "green"}
    other = write_masks(tmp_path / "other", ["a"])
    break_one(other / "masks" / "a.png", 1)
    assert open_masks(str(other), None, like=source).id2label == source.id2label
    break_one(other / "masks" / "a.png", 3)
    with pytest.raises(ValueError, match="holds 3, which is no class"):
        open_masks(str(other), None, like=source)


def test_parts_of_a_source_and_what_a_run_knows_it_by(tmp_path):
    source = folder_masks(write_masks(tmp_path / "set", [str(number) for number in range(10)]))
    kept, held = held_out_pixels(source, 0.3)
    assert kept.size == 7 and held.size == 3 and held.name == "set, held out"
    assert sorted([*kept.keys, *held.keys]) == sorted(source.keys)
    assert held.read(1).name.endswith(held.keys[1])
    assert len({part.fingerprint for part in (source, kept, held)}) == 3
    assert pixel_subset(source, [4]).read(0).name.endswith("4.png")
    for share in (0.01, 0.99):
        with pytest.raises(ValueError, match="leave nothing"):
            held_out_pixels(source, share)


def test_a_table_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    root = write_masks(tmp_path / "set")
    files = {part: [str(path) for path in sorted((root / part).iterdir())] for part in ("images", "masks")}
    table = datasets.Dataset.from_dict({"pixel_values": files["images"], "label": files["masks"]})
    table = table.cast_column("pixel_values", datasets.Image()).cast_column("label", datasets.Image())
    table.to_parquet(tmp_path / "set.parquet")
    source = open_masks(None, str(tmp_path / "set.parquet"))
    assert source.size == 4 and np.array_equal(source.read(2).labels, blocks(2))
    assert np.array_equal(np.array(source.read(2).image), COLORS[blocks(2)])
    with pytest.raises(ValueError, match="no column 'masks' among pixel_values, label; set --mask-column"):
        open_masks(None, str(tmp_path / "set.parquet"), mask_column="masks")


def test_chase_db1_is_read_as_it_lies(shared):
    root = shared / "data" / "dense" / "retina" / "CHASEDB1" / "test"
    source = folder_masks(root)
    sample = source.read(0)
    assert source.size == 8 and sample.labels.shape == (960, 999) and {*np.unique(sample.labels)} == {0, 1}
