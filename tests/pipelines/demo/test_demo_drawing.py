"""What a page draws: what is offered, what is refused, moment by moment, stopped, and once more by the code."""

import io
import json
import threading
import zipfile
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler
from helpers.digit_painter import digit_painter
from helpers.pipelines import tiny_pipeline, tiny_vae

from d_emo import DEMOPipeline, FlowMatchODESolverScheduler
from d_emo.pipelines import NonFiniteSampleError
from d_emo.pipelines.demo.drawing import MOMENTS, Limits, Studio, moments, new_seed, strip
from d_emo.pipelines.demo.opening import Source, open_model
from d_emo.pipelines.demo.results import write_archive
from d_emo.pipelines.demo.snippets import drawing_code, settings_shown


def pixels(images):
    return [np.asarray(image) for image in images]


def drawn(studio, wish, stop=None):
    """All moments of a drawing."""
    return list(studio.draw(wish, stop or threading.Event()))


@pytest.fixture
def studio():
    return Studio(tiny_pipeline(num_layers=1))


def few(studio, **changes):
    return replace(studio.default, **{"count": 2, "steps": 5, **changes})


@pytest.mark.parametrize(
    ("flow", "expected"), [(False, ["own", "ddpm", "ddim"]), (True, ["own", "euler", "heun", "sde", "sde-heun"])]
)
def test_samplers_are_those_of_the_models_objective(flow, expected):
    studio = Studio(tiny_pipeline(flow, num_layers=1))
    assert list(studio.samplers) == expected
    assert [name for _, name in studio.sampler_choices] == expected


def test_samplers_that_would_begin_where_the_model_has_no_velocity_are_not_offered():
    studio = Studio(tiny_pipeline(True, num_layers=1, prediction_type="score", flow_path="linear"))
    assert "heun" not in studio.samplers and "euler" in studio.samplers


def test_a_saved_solver_that_shows_no_way_is_not_offered():
    pipeline = tiny_pipeline(True, num_layers=1)
    pipeline.scheduler = FlowMatchODESolverScheduler()
    studio = Studio(pipeline)
    assert next(iter(studio.samplers)) == studio.default.sampler == "euler"


def test_sizes_are_what_the_model_takes_in_its_own_ratio_up_to_the_limit():
    pipeline = tiny_pipeline(num_layers=1)  # 16 x 16 pixels in patches of 2
    assert Studio(pipeline).sizes == [(8, 8), (12, 12), (16, 16), (20, 20), (24, 24), (32, 32)]
    assert Studio(pipeline, Limits(side=20)).sizes == [(8, 8), (12, 12), (16, 16), (20, 20)]
    assert Studio(pipeline, Limits(side=4)).sizes == [(16, 16)]
    wide = Studio(tiny_pipeline(num_layers=1, sample_size=[8, 16]))
    assert (8, 16) in wide.sizes and all(2 * height == width for height, width in wide.sizes)


def test_every_class_has_a_name_and_many_are_in_the_order_of_the_alphabet():
    assert Studio(tiny_pipeline(num_layers=1)).classes == [
        ("tench, Tinca tinca", 0), ("crane, bird", 1), ("crane, machine", 2),
    ]  # fmt: skip
    pipeline = tiny_pipeline(num_layers=1, num_classes=40)
    names = [name for name, _ in Studio(pipeline).classes]
    assert names == sorted(names, key=str.casefold) and "class 39" in names and len(set(names)) == 40


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 17}, "images=17 is not a whole number from 1 to 16"),
        ({"count": 0}, "images=0"),
        ({"steps": 251}, "steps=251 is not a whole number from 1 to 250"),
        ({"guidance": 0.5}, "guidance=0.5"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": None}, "seed=None"),
        ({"label": 3}, "class=3"),
        ({"label": None}, "class=None"),
        ({"sampler": "euler"}, "sampler='euler' is not one of own, ddpm, ddim"),
        ({"height": 4096, "width": 4096}, "size=4096 x 4096 is none of this page's: 8 x 8, 12 x 12"),
    ],
)
def test_what_is_beyond_a_limit_is_refused_in_a_line(studio, changes, said):
    with pytest.raises(ValueError) as refusal:
        studio.checked(few(studio, **changes))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_an_unconditional_model_has_no_class_and_no_guidance():
    studio = Studio(tiny_pipeline(num_layers=1, num_classes=0))
    *_, last = drawn(studio, few(studio))
    assert not studio.conditional and len(last.images) == 2 and last.settings["guidance_scale"] == 1.0


def test_moments_begin_with_the_first_step_and_end_with_the_last():
    assert moments(1) == [1] and moments(3) == [1, 2, 3]
    for steps in (8, 50, 99, 250):
        found = moments(steps)
        assert len(found) == MOMENTS and (found[0], found[-1]) == (1, steps) and sorted(set(found)) == found


def test_pictures_come_as_they_are_drawn_and_the_last_are_the_pipelines_own(studio):
    told = drawn(studio, few(studio, steps=20))
    shown = [moment.step for moment in told if moment.images]
    assert shown == moments(20) and [moment.done for moment in told][-2:] == [False, True]
    noisy, clean = pixels(told[0].images), pixels(told[-1].images)
    assert not np.array_equal(noisy[0], clean[0]) and not told[-1].stopped
    assert told[-1].settings["num_inference_steps"] == 20 and told[-1].settings["seed"] == 0


@pytest.fixture(scope="module")
def painter():
    return digit_painter()  # which imports scikit-learn


def test_a_way_goes_from_noise_to_a_digit(painter):
    studio, network = Studio(painter), painter.transformer
    told = drawn(studio, few(studio, label=3, steps=20, count=1))
    real = (network.pixels[network.labels == 3] + 1) / 2
    gaps = [
        float((real - torch.from_numpy(np.asarray(moment.images[0]) / 255).flatten()).pow(2).mean(1).sqrt().min())
        for moment in told
        if moment.images
    ]
    assert gaps[0] > 0.3 and gaps[-1] < 0.01
    row = strip([(moment.step, moment.images[0]) for moment in told if moment.images])
    assert row.width == MOMENTS * 50 and row.height == 66


def test_a_decoders_pictures_are_shown_in_its_size_and_looking_changes_nothing():
    pipeline = DEMOPipeline(tiny_pipeline(in_channels=4, num_layers=1).transformer, DDIMScheduler(), tiny_vae())
    studio = Studio(pipeline)
    wish = few(studio, steps=10)
    told = drawn(studio, wish)
    assert studio.own_size == (32, 32) and {image.size for m in told if m.images for image in m.images} == {(32, 32)}
    from d_emo.pipelines.samplers import image_generator

    generators = [image_generator(wish.seed, index) for index in range(2)]
    alone = pipeline(**studio.arguments(wish), generator=generators).images
    np.testing.assert_array_equal(pixels(told[-1].images), pixels(alone))


def test_an_image_does_not_depend_on_how_many_are_drawn(studio):
    one, several = (drawn(studio, few(studio, count=count))[-1].images for count in (1, 3))
    # Sums in another order: by at most a level of 255.
    assert np.abs(np.asarray(one[0], int) - np.asarray(several[0], int)).max() <= 1


def test_stop_ends_after_the_step_in_progress(studio):
    stop = threading.Event()
    told = []
    for moment in studio.draw(few(studio, steps=200), stop):
        told.append(moment)
        stop.set()
    assert told[-1].stopped and told[-1].done and told[-1].step < 200 and len(told[-1].images) == 2


def test_a_visitor_who_leaves_ends_the_drawing(studio):
    before = threading.active_count()
    drawing = studio.draw(few(studio, steps=200), threading.Event())
    next(drawing)
    drawing.close()
    assert threading.active_count() == before
    assert not drawn(studio, few(studio))[-1].stopped  # and the next one is whole


def test_what_the_pipeline_refuses_comes_out_of_the_drawing(studio):
    with pytest.raises(ValueError, match="num_inference_steps=1"):
        drawn(studio, few(studio, steps=1))
    torch.nn.init.constant_(studio.pipeline.transformer.proj_out.weight, float("nan"))
    with pytest.raises(NonFiniteSampleError):
        drawn(studio, few(studio))


def test_the_model_keeps_its_own_sampler(studio):
    own = studio.pipeline.scheduler
    drawn(studio, few(studio, sampler="ddim"))
    assert studio.pipeline.scheduler is own


def test_new_seeds_are_new_and_allowed(studio):
    seeds = {new_seed() for _ in range(5)}
    assert len(seeds) == 5 and all(studio.checked(few(studio, seed=seed)).seed == seed for seed in seeds)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for flow in (False, True):
        made[flow] = str(tmp_path_factory.mktemp("pipeline") / "a 'quoted\" name")
        tiny_pipeline(flow, num_layers=1).save_pretrained(made[flow])
    return made


@pytest.mark.parametrize(
    ("flow", "changes", "dtype"),
    [
        (False, {}, "float32"),
        (False, {"sampler": "ddim", "height": 12, "width": 12, "guidance": 3.5}, "float32"),
        (False, {"label": 1, "seed": 2**32 - 1}, "bfloat16"),
        (True, {"sampler": "sde", "guidance": 1.0}, "float32"),
        (True, {"sampler": "heun"}, "float32"),
    ],
)
def test_the_code_draws_the_same_pictures(folders, flow, changes, dtype, tmp_path, monkeypatch):
    source = Source(name=folders[flow], dtype=dtype, device="cpu")
    studio = Studio(open_model(source))
    wish = few(studio, **changes)
    last = drawn(studio, wish)[-1]
    code = drawing_code(studio, source, wish)
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(compile(code, "draw.py", "exec"), space)
    np.testing.assert_array_equal(pixels(space["images"]), pixels(last.images))
    with PIL.Image.open(tmp_path / f"{wish.seed}-1.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), pixels(last.images)[1])


def test_a_class_whose_name_is_anothers_too_is_an_id_in_the_code():
    pipeline = tiny_pipeline(num_layers=1)
    pipeline.name_classes({0: "crane", 1: "crane", 2: "tench"})
    studio = Studio(pipeline)
    assert studio.arguments(few(studio, label=1))["class_labels"] == 1
    assert studio.arguments(few(studio, label=2))["class_labels"] == "tench"


def test_the_archive_holds_the_pictures_their_settings_and_the_code(studio, tmp_path):
    last = drawn(studio, few(studio))[-1]
    settings = settings_shown(last.settings)
    path = write_archive(tmp_path / "all.zip", last.images, strip([(5, last.images[0])]), settings, "pass\n")
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["0.png", "1.png", "way.png", "settings.json", "draw.py"]
        assert json.loads(archive.read("settings.json")) == settings
        with PIL.Image.open(io.BytesIO(archive.read("1.png"))) as image:
            np.testing.assert_array_equal(np.asarray(image), pixels(last.images)[1])
