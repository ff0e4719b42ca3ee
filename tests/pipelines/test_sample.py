"""`d-emo sample`: pictures and folders of what a tiny pipeline draws, and everything that it refuses."""

import json
import shlex

import numpy as np
import PIL.Image
import pytest
from helpers.made import write_classifier
from helpers.pipelines import tiny_pipeline

from d_emo.common import packaged as home
from d_emo.common.figures import beside_grid, beside_grid_size
from d_emo.pipelines import sample, sample_command
from d_emo.pipelines.samplers import image_generator

PIPELINES = ("flow", "noise", "free", "headed", "classifier")
FEW = ("--steps", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Pipelines of 16 x 16 pixels: a flow of three classes, a diffusion, one without classes; and a classifier."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline(flow=True, sample_size=16).save_pretrained(folder / "flow")
    tiny_pipeline(sample_size=16).save_pretrained(folder / "noise")
    tiny_pipeline(flow=True, sample_size=16, guide_block=1).save_pretrained(folder / "headed")
    tiny_pipeline(flow=True, sample_size=16, num_classes=0).save_pretrained(folder / "free")
    write_classifier(folder / "classifier")
    return folder


@pytest.fixture
def draw(models, tmp_path, monkeypatch, capsys):
    """`sample` with a model, in an empty folder; what it printed, or the line that it ended with."""
    monkeypatch.chdir(tmp_path)

    def run(model: str, *arguments: str) -> str:
        line = ("--model", model, *FEW, *arguments)
        try:
            sample.main([str(models / word) if word in PIPELINES else word for word in line])
        except SystemExit as stop:
            printed = capsys.readouterr()
            return str(stop.code) if isinstance(stop.code, str) else printed.err.strip()
        return capsys.readouterr().out.strip()

    return run


def pixels(path) -> np.ndarray:
    return np.asarray(PIL.Image.open(path))


def test_a_picture_has_a_row_a_class_and_says_how_it_was_made(draw, models, tmp_path):
    assert draw("flow", "--labels", "Tench", "2", "--num-images", "3", "--output", "grid.png") == "6 images in grid.png"
    picture = PIL.Image.open(tmp_path / "grid.png")
    assert picture.size == beside_grid_size(2, 3, (16, 16), ["tench", "crane"])
    assert picture.size[0] > 3 * 48 and picture.size[1] == 2 * 48 + 2  # enlarged threefold, captions to the left
    said = json.loads(picture.text["d_emo"])
    assert said["classes"] == {"0": "tench", "2": "crane"} and said["seed"] == 0
    assert (said["steps"], said["guidance_scale"], said["sampler"]) == (3, 1.5, "FlowMatchEulerDiscreteScheduler")
    words = shlex.split(said["command"])
    assert words[:2] == ["d-emo", "sample"] and words[2:4] == ["--model", str(models / "flow")]
    again = sample.parse(words[2:])
    assert again.labels == ["Tench", "2"] and again.output == "grid.png"


def test_images_are_those_of_a_call_with_the_same_seeds_whatever_the_batch(draw, models, tmp_path):
    draw("flow", "--labels", "1", "0", "--num-images", "2", "--seed", "5", "--batch-size", "3", "--output", "drawn/")
    files = sorted(path.name for path in (tmp_path / "drawn").glob("*.png"))
    assert files == ["0-crane.png", "1-crane.png", "2-tench.png", "3-tench.png"]
    from d_emo import DEMOPipeline

    pipeline = DEMOPipeline.from_pretrained(models / "flow")
    expected = pipeline(
        [1, 0], num_images_per_label=2, num_inference_steps=3, generator=[image_generator(5, i) for i in range(4)]
    ).images
    for file, image in zip(files, expected, strict=True):
        found = pixels(tmp_path / "drawn" / file).astype(int)
        assert np.abs(found - np.asarray(image)).max() <= 1
        assert found.std() > 1
    about = json.loads(PIL.Image.open(tmp_path / "drawn" / "2-tench.png").text["d_emo"])
    assert (about["index"], about["class"], about["seed"]) == (2, "tench", 5)
    assert json.loads((tmp_path / "drawn" / "samples.json").read_text())["files"] == files


def test_the_same_command_adds_what_a_folder_lacks_and_another_touches_nothing(draw, tmp_path):
    arguments = ("--every-class", "--num-images", "1", "--output", "out")
    assert draw("flow", *arguments) == "3 images drawn into out"
    before = pixels(tmp_path / "out" / "1-crane.png")
    (tmp_path / "out" / "1-crane.png").unlink()
    assert draw("flow", *arguments, "--batch-size", "1") == "1 images drawn into out; 2 were there"
    assert np.abs(pixels(tmp_path / "out" / "1-crane.png").astype(int) - before).max() <= 1
    (tmp_path / "out" / "notes.txt").write_text("mine")
    line = draw("flow", *arguments, "--seed", "1")
    assert line == "sample: --output out holds others (seed 0 -> 1); name another, or pass --overwrite."
    assert draw("flow", *arguments, "--seed", "1", "--format", "jpg", "--overwrite") == "3 images drawn into out"
    left = sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != ".lock")
    assert left == ["0-tench.jpg", "1-crane.jpg", "2-crane.jpg", "notes.txt", "samples.json"]


def test_models_without_classes_are_drawn_without_captions(draw, tmp_path):
    assert draw("free", "--num-images", "17", "--output", "many.webp") == "17 images in many.webp"
    assert PIL.Image.open(tmp_path / "many.webp").size == (16 * 50 - 2, 2 * 50 - 2)
    assert draw("free", "--num-images", "2", "--output", "two") == "2 images drawn into two"
    assert {"0.png", "1.png"} < {path.name for path in (tmp_path / "two").iterdir()}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_another_sampler_size_and_part_of_guidance_are_as_the_pipeline_takes_them(draw, tmp_path, sampler):
    draw(
        "noise", "--labels", "0", "--num-images", "1", "--output", "one.png", "--sampler", sampler, "--steps", "20",
        "--size", "16", "32", "--guidance", "3", "--guidance-interval", "0.2", "0.9", "--guidance-channels", "2",
    )  # fmt: skip
    said = json.loads(PIL.Image.open(tmp_path / "one.png").text["d_emo"])
    assert said["sampler"] == {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}[sampler]
    assert (said["height"], said["width"], said["guidance_interval"]) == (16, 32, [0.2, 0.9])


def test_other_guidance_is_recorded_and_draws_other_pictures(draw, models, tmp_path):
    one = ("--labels", "0", "1", "--num-images", "1", "--guidance", "2", "--output")
    draw("headed", *one, "plain")
    other = ("--guide", "flow", "--guider", "apg", "--internal-guidance", "1.4")
    assert draw("headed", *one, "out", *other) == "2 images drawn into out"
    said = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert (said["guider"], said["guide"], said["internal_guidance"]) == ("apg", str(models / "flow"), 1.4)
    assert len(said["guide_weights"]) > 8
    assert "guide" not in json.loads((tmp_path / "plain" / "samples.json").read_text())
    assert np.abs(
        pixels(tmp_path / "out" / "0-tench.png").astype(int) - pixels(tmp_path / "plain" / "0-tench.png")
    ).any()
    assert draw("headed", *one, "out", *other) == "0 images drawn into out; 2 were there"
    assert "holds others (guide" in draw("headed", *one, "out")


@pytest.mark.parametrize(
    ("model", "arguments", "line"),
    [
        ("flow", "--labels tenhc --output a.png", "--labels: label 'tenhc' is unknown; close names (ids): tench (0)."),
        ("flow", "--labels crane --output a.png", "--labels: label 'crane' is ambiguous; pass one of these ids or"),
        ("flow", "--labels 3 --output a.png", "--labels: label 3 is out of range; this model has classes 0 to 2."),
        ("flow", "--output a.png", "--labels is missing: the model has 3 classes, such as tench, Tinca tinca; crane"),
        ("flow", "--labels 1 --every-class --output a.png", "--every-class: not allowed with argument --labels"),
        ("free", "--labels 1 --output a.png", "is unconditional, it knows no classes; leave it out."),
        ("nowhere", "--labels 1 --output a.png", "--model nowhere: neither a pipeline folder, nor a packaged model"),
        ("classifier", "--labels 1 --output a.png", "there is no pipeline in it (no model_index.json), but a EMOv2For"),
        ("flow", "--labels 1 --output a.pgn", "--output a.pgn: Pillow writes no .pgn; did you mean .p"),
        ("flow", "--labels 1 --output a.png --format jpg", "--format jpg is for files in a folder; a.png says itself"),
        ("flow", "--labels 1 --output a.png --num-images 0", "--num-images: 0 is not a whole number from 1 on"),
        ("flow", "--every-class --output a --num-images 400000", "asks for 1,200,000 images, more than 1,000,000"),
        ("flow", "--every-class --output a.png --num-images 90000", "which few programs open; draw into a folder: "),
        (
            "flow",
            "--every-class --output a.webp --num-images 2000",
            "Pillow writes no WEBP of 842 x 18748 colour pixels (en",
        ),
        ("flow", "--labels 1 --output a.png --device tpu9", "--device tpu9: "),
        ("flow", "--labels 1 --output a.png --sampler ddim", "--sampler='ddim': the model predicts the flow and is"),
        ("flow", "--labels 1 --output a.png --size 17", "--size: height=17 is not a positive multiple of"),
        ("flow", "--labels 1 --output a.png --size 16 16 16", "--size 16 16 16: give one side, or height and width."),
        ("flow", "--labels 1 --output a --guidance-channels 9", "guidance_channels=9 is not a whole number from 1 to"),
        ("flow", "--labels 1 --output a.png --guider pag", "sample: --guider: invalid choice: 'pag'"),
        ("flow", "--labels 1 --output a.png --guide no", "--guide no: neither a pipeline folder, nor a packaged model"),
        ("flow", "--labels 1 --output a.png --guide noise", "guide: the weaker model has prediction 'epsilon', not '"),
        ("flow", "--labels 1 --output a.png --internal-guidance 2", "internal_guidance=2.0: the model has no second"),
        ("free", "--output a.png --guider apg", "guider='apg': the model is unconditional"),
        ("noise", "--labels 1 --output a.png --guider zero-star", "begins with a velocity of zero, and the model pre"),
        ("flow", "--labels 1 --output a.png --vae v", "draws pixels and has no decoder; leave --vae out."),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line_and_leaves_nothing(draw, tmp_path, offline, model, arguments, line):
    said = draw(model, *arguments.split())
    assert line in said and "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_is_there_is_replaced_unasked(draw, tmp_path):
    (tmp_path / "mine.png").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    one = ("--labels", "0", "--num-images", "1", "--output")
    assert draw("flow", *one, "mine.png") == (
        "sample: --output mine.png is there already; name another, or pass --overwrite."
    )
    assert draw("flow", *one, "folder", "--overwrite") == (
        "sample: --output folder holds something else than images of this command; name another folder."
    )
    (tmp_path / "folder" / "samples.json").write_text('{"files": ["../mine.png"]}')
    assert "holds something else" in draw("flow", *one, "folder", "--overwrite")
    assert (tmp_path / "mine.png").read_text() == (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    assert draw("flow", *one, "mine.png", "--overwrite") == "1 image in mine.png"


def test_a_packaged_name_comes_before_a_folder_which_is_said(draw, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(home, "_FOLDER", models)
    sample.main(["--model", "flow", *FEW, "--labels", "0", "--num-images", "1", "--output", "a.png"])
    (tmp_path / "flow").mkdir()
    capsys.readouterr()
    sample.main(["--model", "flow", *FEW, "--labels", "0", "--num-images", "1", "--output", "b.png"])
    assert capsys.readouterr().err == "flow: the model that comes with the package; write ./flow for what lies here.\n"
    assert "./flow: this pipeline does not load" in draw("./flow", "--labels", "0", "--output", "c.png")
    assert "did you mean flow?" in draw("flows", "--labels", "0", "--output", "c.png")


def test_progress_counts_the_steps_of_all_batches(draw, monkeypatch):
    totals, updates = [], []

    class Counted(sample_command.Progress):
        def __init__(self, total, unit, about):
            super().__init__(total, unit, about)
            totals.append((total, unit))

        def update(self, count=1, **shown):
            super().update(count, **shown)
            updates.append(count)

    monkeypatch.setattr(sample_command, "Progress", Counted)
    for sampler, name in (("own", "a"), ("heun", "b")):
        draw("flow", "--every-class", "--num-images", "1", "--batch-size", "2", "--sampler", sampler, "--output", name)
        assert totals[-1] == (6, "step") and sum(updates) == 6 and max(updates) <= 1
        updates.clear()


def test_long_names_are_cut_beside_rows():
    row = [PIL.Image.new("L", (64, 40))] * 2
    picture = beside_grid([row, row[:1]], ["x" * 200, ""])
    assert picture.size == beside_grid_size(2, 2, (64, 40), ["x" * 200, ""])
    assert picture.size[0] <= 160 + 12 + 130 and picture.size[1] == 82
    assert (np.asarray(picture)[42:, -64:] == 255).all()  # where a row is shorter
