"""Sweeps: the grid that is meant, mistakes before anything is drawn, what is scored, what a kill leaves."""

import json
import shutil

import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.pipelines import tiny_pipeline
from helpers.processes import run_script
from helpers.training import run_here

from d_emo.eval import evaluate_fid
from d_emo.eval.fid import sampling, sweep
from d_emo.eval.fid.image_sets import open_set
from d_emo.eval.fid.metrics import frechet_distance, moments_of
from d_emo.eval.fid.protocol import SamplingSettings
from d_emo.eval.fid.scoring import load_scores
from d_emo.eval.fid.sweep import make_points, parse_sweep, sweep_table


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved flow model of 8 x 8 grey images with ten classes."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(flow=True, in_channels=1, num_classes=10, sample_size=8).save_pretrained(folder)
    return folder


def arguments(model, tmp_path, *more):
    return ("--model", model, "--preset", "quick", "--num-images", 24, "--steps", 2, "--reference", "digits",
                 "--features", "pixels", "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache",
                 "--sweep-images", 10, "--metrics", "fid", *more)  # fmt: skip


def swept(capsys, model, tmp_path, *more):
    return run_here(capsys, *arguments(model, tmp_path, *more), main=evaluate_fid.main)


def test_ranges_have_both_ends_and_lists_are_as_given():
    grid = parse_sweep(["guidance=1.0:2.0:0.25", "steps=25,50", "shift=1:1.35:0.1", "interval-start=0.3"])
    assert grid["guidance"] == [1.0, 1.25, 1.5, 1.75, 2.0]
    assert grid["steps"] == [25, 50] and grid["interval-start"] == [0.3]
    assert grid["shift"] == [1.0, 1.1, 1.2, 1.3]  # 1.35 is on no step; no 1.3000000000000003
    assert parse_sweep(["guidance=1.1:1.4:0.1"]) == {"guidance": [1.1, 1.2, 1.3, 1.4]}


def test_points_are_every_combination_with_the_other_settings_of_the_preset():
    base = SamplingSettings(num_images=100, guidance_scale=1.5, guidance_interval=(0.2, 0.9), steps=7)
    points = make_points(parse_sweep(["steps=25,50", "interval-start=0.0,0.4", "shift=2"]), base, 30)
    found = [(p.settings.steps, p.settings.guidance_interval, p.settings.time_shift) for p in points]
    assert found == [(25, (0.0, 0.9), 2), (25, (0.4, 0.9), 2), (50, (0.0, 0.9), 2), (50, (0.4, 0.9), 2)]
    assert {(p.settings.num_images, p.settings.guidance_scale) for p in points} == {(30, 1.5)}
    assert points[1].label == "steps-25,interval-start-0.4,shift-2"
    near = make_points(parse_sweep(["guidance=1.5:1.500001:0.0000005"]), base, 30)
    assert len({point.label for point in near}) == 3  # folders of their own
    assert make_points({"steps": [3.0]}, base, 1000)[0].settings.num_images == 100


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["seed=1,2"], "--sweep seed=1,2: 'seed' cannot be swept; NAME=VALUES with one of guidance, internal-guid"),
        (["guidance"], "--sweep guidance: '' is not a number; write guidance=START:STOP:STEP"),
        (["guidance=1:2"], "'1:2' is not three numbers"),
        (["guidance=2:1:0.5"], "'2:1:0.5' does not go up"),
        (["guidance=1:2:0"], "'1:2:0' does not go up"),
        (["guidance=1:2:1e-9"], "more than 200 values"),
        (["guidance=1,nan"], "'nan' is not a finite number"),
        (["guidance=1,1.0"], "a value stands there twice"),
        (["steps=1,2", "steps=3"], "steps is swept twice"),
        (["steps=1:100:1", "guidance=1,2,3"], "300 points or more; at most 200"),
        (["guidance=0.5"], "--guidance-scale=0.5 is not a number from 1 to 1000"),
        (["internal-guidance=0.5"], "--internal-guidance=0.5 is not a number from 1 to 1000"),
        (["internal-guidance=1,1.4"], "--sweep, internal-guidance-1.4: internal_guidance=1.4: the model has no second"),
        (["guidance=1,1e6"], "--guidance-scale=1000000.0 is not a number from 1 to 1000"),
        (["steps=2.5"], "--steps=2.5 is not a whole number"),
        (["shift=0"], "--time-shift=0.0 is not None or"),
        (["interval-start=0.9", "interval-stop=0.5"], "--guidance-interval="),
    ],
)  # fmt: skip
def test_mistakes_in_a_sweep_end_before_anything_is_drawn(capsys, model, tmp_path, texts, message):
    code, printed = swept(capsys, model, tmp_path, "--sweep", *texts)
    assert code != 0 and message in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_a_sweep_goes_with_one_model_and_its_distance(capsys, model, tmp_path):
    for more, message in (
        (("--checkpoints", "all"), "--sweep goes with --model and one model"),
        (("--metrics", "kid"), "--sweep compares points by fid; add it"),
    ):
        code, printed = swept(capsys, model, tmp_path, "--sweep", "guidance=1,2", *more)
        assert code != 0 and message in printed and not (tmp_path / "out").exists()


def test_the_best_point_of_a_small_set_is_scored_on_the_full_one(capsys, model, tmp_path):
    code, printed = swept(capsys, model, tmp_path, "--sweep", "guidance=1,4", "steps=1,2")
    assert code == 0, printed
    out = tmp_path / "out"
    stored = json.loads((out / "sweep.json").read_text())
    assert stored["images"] == 10 and len(stored["points"]) == 4
    # Every point's distance is that of ten images drawn with it, against the digits.
    digits = open_set("digits", (8, 8))
    real = moments_of(digits.read(0, len(digits)).reshape(len(digits), -1) / 255)
    accelerator = sampling.Accelerator(cpu=True)
    pipeline = sampling.load_pipeline(str(model))
    for place, point in enumerate(stored["points"][1:3]):
        settings = SamplingSettings(
            num_images=10, sampler="fast", steps=int(point["steps"]), guidance_scale=point["guidance"]
        )
        images = sampling.sample_images(pipeline, settings, tmp_path / str(place), accelerator, 32)
        drawn = moments_of(images.read(0, 10).reshape(10, -1) / 255)
        assert point["fid"] == pytest.approx(frechet_distance(real, drawn), rel=1e-2)  # a grey level
    distances = [point["fid"] for point in stored["points"]]
    assert len(set(distances)) == 4
    best = stored["points"][int(np.argmin(distances))]
    assert stored["best"] == {name: best[name] for name in ("guidance", "steps")}
    label = f"guidance-{best['guidance']:g},steps-{best['steps']:g}"
    full = load_scores(out / label / "scores.json")
    assert full.count == 24 and full.conditions["drawn"]["sampling"]["guidance_scale"] == best["guidance"]
    assert f"| {best['guidance']:g} | {best['steps']:g} | {best['fid']:.4f} (best) |" in printed
    page = (out / "report.html").read_text()
    assert "(best)" in page and page.count("data:image/png;base64,") == 3
    assert (out / "sweep.png").stat().st_size > 5000
    # Pictures stay of every point, samples and features of the full set only.
    folders = sorted(path.name for path in (out / "sweep").iterdir())
    assert len(folders) == 4
    assert all({p.name for p in (out / "sweep" / f).iterdir()} >= {"scores.json", "samples.png"} for f in folders)
    assert not list((out / "sweep").glob("*/samples")) and (out / label / "samples").is_dir()


def test_internal_guidance_and_a_weaker_model_are_swept_recorded_and_compared(capsys, model, tmp_path):
    headed = tmp_path / "headed"
    more = {"flow": True, "in_channels": 1, "num_classes": 10, "sample_size": 8}
    tiny_pipeline(**more, guide_block=1).save_pretrained(headed)
    weak = ("--guide", model, "--guider", "apg", "--guidance-scale", 2)
    code, printed = swept(capsys, headed, tmp_path, *weak, "--sweep", "internal-guidance=1,3")
    assert code == 0, printed
    assert f"guidance 2 by apg away from {model} on all channels" in printed
    one, three = json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]
    assert one["fid"] != three["fid"]
    best = one if one["fid"] < three["fid"] else three
    full = tmp_path / "out" / f"internal-guidance-{best['internal-guidance']:g}"
    drawn = load_scores(full / "scores.json").conditions["drawn"]
    assert drawn["sampling"]["internal_guidance"] == best["internal-guidance"]
    assert (drawn["sampling"]["guider"], drawn["sampling"]["guide"]) == ("apg", str(model))
    assert len(drawn["guide"]["transformer"]) > 8
    reasons = load_scores(full / "scores.json").not_comparable
    assert any(f"guide: None -> {model}" in reason for reason in reasons)
    # The same name with other weights is another weaker model.
    pipeline = sampling.load_pipeline(str(headed))
    settings = SamplingSettings(steps=2, sampler="fast", guide=str(model))
    found = [sampling.make_manifest(pipeline, settings, guide) for guide in map(
        sampling.load_pipeline, (str(model), str(headed)))]  # fmt: skip
    (tmp_path / "old").mkdir()
    sampling.write_manifest(tmp_path / "old", found[0])
    with pytest.raises(sampling.ManifestError, match=r"guide\.transformer"):
        sampling.check_samples(tmp_path / "old", found[1])


def test_samples_from_before_there_was_other_guidance_are_taken(tmp_path, model):
    pipeline, settings = sampling.load_pipeline(str(model)), SamplingSettings(steps=2, sampler="fast")
    stored = sampling.make_manifest(pipeline, settings)
    for name in ("guider", "guide", "internal_guidance"):
        del stored["sampling"][name]
    del stored["guide"]
    sampling.write_manifest(tmp_path, stored)
    assert sampling.check_samples(tmp_path, sampling.make_manifest(pipeline, settings))


@pytest.mark.slow
def test_two_processes_sweep_as_one_does(capsys, model, tmp_path):
    more = ("--sweep", "guidance=1,4", "--output-dir")
    line = [str(word) for word in arguments(model, tmp_path, *more, tmp_path / "both")]
    code, printed = run_script(tmp_path / "log", ROOT / "eval" / "evaluate_fid.py", *line, processes=2)
    assert code == 0, printed
    code, printed = swept(capsys, model, tmp_path, *more, tmp_path / "one")
    assert code == 0, printed
    both, one = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("both", "one"))
    assert both["best"] == one["best"] and printed.count("point ") == 2
    assert [p["fid"] for p in both["points"]] == pytest.approx([p["fid"] for p in one["points"]], rel=1e-2)


def test_a_sweep_goes_on_where_it_was_killed(capsys, model, tmp_path, monkeypatch):
    original, drawn = sampling.draw_images, []

    def killed(pipeline, settings, *rest):
        if len({settings for settings, _ in drawn} | {settings}) > 2:
            raise KeyboardInterrupt
        drawn.append((settings, rest))
        return original(pipeline, settings, *rest)

    monkeypatch.setattr(sampling, "draw_images", killed)
    code, _ = swept(capsys, model, tmp_path, "--sweep", "guidance=1,2,4")
    assert code != 0 and len(list((tmp_path / "out" / "sweep").glob("*/scores.json"))) == 2
    again = []
    monkeypatch.setattr(sampling, "draw_images", lambda p, s, *rest: again.append(s) or original(p, s, *rest))
    code, printed = swept(capsys, model, tmp_path, "--sweep", "guidance=1,2,4")
    assert code == 0, printed
    assert {(s.guidance_scale, s.num_images) for s in again} >= {(4, 10)}
    assert not {(s.guidance_scale, s.num_images) for s in again} & {(1, 10), (2, 10)}
    whole = tmp_path / "whole"
    code, printed = swept(capsys, model, tmp_path, "--sweep", "guidance=1,2,4", "--output-dir", whole)
    stored = [json.loads((folder / "sweep.json").read_text()) for folder in (tmp_path / "out", whole)]
    assert [p["fid"] for p in stored[0]["points"]] == pytest.approx([p["fid"] for p in stored[1]["points"]], rel=1e-2)
    # Another number of images is other samples, found before anything is drawn: of the small set, and of the full one.
    again.clear()
    code, printed = swept(capsys, model, tmp_path, "--sweep", "guidance=1,2,4", "--sweep-images", 12)
    assert code != 0 and "sampling.num_images 10 -> 12" in printed and not again
    shutil.rmtree(tmp_path / "out" / "sweep")
    code, printed = swept(capsys, model, tmp_path, "--sweep", "guidance=1,2,4", "--num-images", 25)
    assert code != 0 and "sampling.num_images 24 -> 25" in printed and not again


def test_points_are_scored_again_against_another_reference_and_their_samples_do_not_stay(capsys, model, tmp_path):
    distances, point = [], tmp_path / "out" / "sweep" / "guidance-2"
    for count in (100, 100, 300):
        code, printed = swept(capsys, model, tmp_path, "--sweep", "guidance=2", "--reference-images", count)
        assert code == 0, printed
        assert load_scores(point / "scores.json").conditions["reference"]["images"][0] == count
        assert not (point / "samples").exists()
        (point / "samples").mkdir()  # as a kill after the scores leaves them
        distances.append(json.loads((tmp_path / "out" / "sweep.json").read_text())["points"][0]["fid"])
    assert distances[0] == distances[1] != distances[2]


def test_the_plot_is_against_what_takes_most_values_and_the_table_marks_the_best(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **more: lines.append((more.get("label"), x, y)))
    monkeypatch.setattr(Axes, "legend", lambda *_, **__: None)
    points = make_points(parse_sweep(["steps=25,50", "guidance=1,2,3"]), SamplingSettings(), 10)
    results = [sweep.ScoredPoint(point, distance) for point, distance in zip(points, (5, 3, 4, 6, 2, 7), strict=True)]
    sweep.plot_sweep(tmp_path / "a.png", results, "inception")
    assert lines == [("steps 25", (1, 2, 3), (5, 3, 4)), ("steps 50", (1, 2, 3), (6, 2, 7)), ("best", 2, 2)]
    table = sweep_table(results, "inception").splitlines()
    assert table[0] == "| steps | guidance | FID-10 |" and table[6] == "| 50 | 2 | 2.0000 (best) |"
