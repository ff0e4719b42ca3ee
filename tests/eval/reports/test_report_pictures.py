"""What is drawn: maps over pictures, objects, strips, legends."""

import itertools

import numpy as np
import PIL.Image
import pytest

from d_emo.eval.reports.boxes import Objects, compare_objects, draw_objects
from d_emo.eval.reports.overlays import UNLABELLED, WRONG, backgrounds, compare_maps, errors, overlay
from d_emo.eval.reports.panels import class_colour, clipped, fitted, font, legend, palette, strip

WHITE = PIL.Image.new("RGB", (40, 20), "white")


def test_colours_of_classes_are_apart_and_stay():
    assert class_colour(0) == (255, 36, 36) == class_colour(255)
    assert len({tuple(colour) for colour in palette().tolist()}) == 255
    colours = palette()[:21].astype(float)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) > 80


def test_a_map_lies_over_its_picture():
    labels = np.zeros((20, 40), np.int32)
    labels[:, 10:20], labels[:, 20:30], labels[:, 30:] = 1, 2, 255
    pixels = np.asarray(overlay(WHITE, labels, clear={2}, opacity=0.5))
    for column, colour in ((5, class_colour(0)), (15, class_colour(1)), (35, UNLABELLED)):
        np.testing.assert_allclose(pixels[10, column], (255 + np.array(colour)) / 2, atol=0.51)
    assert (pixels[10, 25] == 255).all()
    with pytest.raises(ValueError, match=r"labels have the shape \(2, 2\)"):
        overlay(WHITE, np.zeros((2, 2)))


def test_wrong_pixels_are_red_and_unknown_ones_are_not():
    truth, predicted = np.zeros((20, 40), int), np.zeros((20, 40), int)
    predicted[0], truth[1], predicted[1] = 1, 255, 1
    pixels = np.asarray(errors(WHITE, truth, predicted))
    assert (pixels[0] == WRONG).all()
    assert (pixels[1] == UNLABELLED).all()
    assert not (pixels[2:] == WRONG).all(axis=2).any()


def test_maps_are_compared_over_a_legend_of_the_classes_that_occur():
    truth = np.zeros((20, 40), np.int32)
    truth[:5], truth[5] = 1, 255
    names = {0: "background", 1: "vessel", 2: "never"}
    picture = compare_maps(WHITE, truth, np.zeros_like(truth), names, side=200)
    colours = {colour for _, colour in picture.getcolors(maxcolors=1 << 20)}
    assert class_colour(1) in colours and UNLABELLED in colours  # swatches are not mixed with the picture
    assert class_colour(0) not in colours and class_colour(2) not in colours
    assert picture.width == 4 * 200 + 3 * 6
    assert WRONG in colours


@pytest.mark.parametrize(
    ("names", "clear"),
    [(["Background", "a", "void "], {0, 2}), (["0", "1"], {0}), (["0", "1", "2"], set()), (["sky", "sea"], set())],
)
def test_classes_that_say_that_nothing_is_there(names, clear):
    assert backgrounds(dict(enumerate(names))) == clear


def test_objects_are_drawn_where_they_are_when_the_picture_is_scaled():
    mask = np.zeros((1, 20, 40), bool)
    mask[0, 4:8, 10:20] = True
    objects = Objects(np.array([[10.0, 4.0, 20.0, 8.0]]), np.array([1]), np.array([0.5]), mask)
    pixels = np.asarray(draw_objects(WHITE, objects, {1: "a"}, side=400), dtype=int)
    assert pixels.shape == (200, 400, 3)
    colour = np.array(class_colour(1))
    assert (pixels[60, 100] == colour).all() and (pixels[60, 200] == colour).all()  # the box's sides
    inside = pixels[70, 150]
    assert (inside != colour).any() and (inside != 255).any()  # the mask lies between
    assert (pixels[150, 300] == 255).all()


@pytest.mark.parametrize(
    "box", [[-50, -50, 500, 500], [30, 15, 10, 5], [np.nan, 0, np.inf, 1], [60, 60, 70, 70], [5, 5, 5, 5]]
)
def test_boxes_that_are_none_are_drawn_without_an_error(box):
    objects = Objects(np.array([box], float), np.array([7]), np.array([1.0]), None, np.array([True]))
    assert draw_objects(WHITE, objects, {7: "a very long name " * 20}).size == (560, 280)


def test_a_picture_without_objects():
    nothing = Objects(np.zeros((0, 4)), np.zeros(0, int))
    assert compare_objects(WHITE, nothing, nothing, {}, side=100).width == 206


def test_frames_in_a_strip():
    frames = [np.full((10, 10, 3), value, np.uint8) for value in (0, 100, 200)]
    pixels = np.asarray(strip(frames, side=50))
    assert pixels.shape[1] == 3 * 50 + 2 * 6
    assert [int(pixels[40, column, 0]) for column in (25, 81, 137)] == [0, 100, 200]


def test_long_legends_are_cut_and_long_names_too():
    entries = [(f"class {number} \n", class_colour(number)) for number in range(200)]
    picture = legend(entries, 300)
    colours = {colour for _, colour in picture.getcolors(maxcolors=1 << 20)}
    assert class_colour(23) in colours and class_colour(24) not in colours
    assert font().getlength(clipped("long " * 100, 80)) <= 80
    assert clipped("a\x1b", 80) == "a\\x1b"


def test_small_pictures_are_enlarged_with_visible_pixels():
    pixels = np.asarray(fitted(PIL.Image.fromarray(np.array([[0, 255]], np.uint8)), 100))
    assert pixels.shape == (50, 100, 3)
    assert set(np.unique(pixels)) == {0, 255}
