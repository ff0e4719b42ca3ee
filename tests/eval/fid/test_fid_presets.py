"""Presets of published protocols: what they draw with, where they may be compared, the document's table."""

import numpy as np
import pytest
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from helpers.paths import ROOT
from helpers.pipelines import tiny_pipeline

from d_emo.eval.fid import sampling
from d_emo.eval.fid.names import PRESET_NOTES
from d_emo.eval.fid.protocol import (
    PRESETS,
    PUBLICATIONS,
    SamplingSettings,
    describe_settings,
    make_sampler,
    preset_changes,
    shift_of,
    with_settings,
)
from d_emo.eval.fid.sampling import ManifestError, make_manifest, sample_images
from d_emo.eval.fid.scoring import why_not_comparable
from d_emo.eval.tables import preset_table


def laid(pipeline, settings):
    """Times s that the model is asked at."""
    pipeline.scheduler = make_sampler(settings, pipeline)
    pipeline.check_steps(settings.steps)  # lays them
    return pipeline.scheduler.timesteps.numpy() / 1000


def test_every_preset_has_its_note_and_its_source():
    assert set(PRESETS) == set(PUBLICATIONS) == set(PRESET_NOTES)
    assert all(publication.sources for publication in PUBLICATIONS.values())


def test_presets_of_2026_are_as_published():
    def of(name, *settings):
        return tuple(getattr(PRESETS[name], setting) for setting in settings)

    # bytetriper/RAE, sampling configuration and README; sihyun-yu/REPA and LTH14/JiT, README; hustvl/LightningDiT,
    # configuration of 800 epochs.
    assert of("rae", "sampler", "steps", "labels", "guidance_scale", "time_shift") == (
        "euler",
        50,
        "balanced",
        1,
        "auto",
    )
    assert of("repa", "sampler", "steps", "labels", "guidance_scale") == ("sde", 250, "random", 1.8)
    assert of("lightningdit", "sampler", "steps", "labels", "guidance_scale") == ("euler", 250, "random", 6.7)
    assert of("jit", "sampler", "steps", "labels", "guidance_scale") == ("heun", 50, "balanced", 3.0)
    # Their times: REPA guides at t <= 0.7, where 1 is noise; JiT at t > 0.1 and LightningDiT at t >= 0.125, 0 is noise.
    assert of("repa", "guidance_interval") == ((pytest.approx(1 - 0.7), 1.0),)
    assert of("jit", "guidance_interval") == ((0.1, 1.0),)
    assert of("lightningdit", "guidance_interval", "guidance_channels") == ((0.125, 1.0), 3)


def test_a_shift_lays_the_times_that_the_papers_formula_gives():
    even = np.linspace(1, 0, 9)[:-1]
    for shift in (0.25, 1.0, 1 / 0.3, 6.93):
        settings = SamplingSettings(sampler="euler", steps=8, time_shift=shift)
        expected = shift * even / (1 + (shift - 1) * even)  # s is RAE's t
        np.testing.assert_allclose(laid(tiny_pipeline(flow=True), settings), expected, atol=1e-6)
    # LightningDiT's time runs from noise at 0: t -> 0.3 t / (1 + (0.3 - 1) t).
    reversed_time = 1 - even
    lightning = 0.3 * reversed_time / (1 + (0.3 - 1) * reversed_time)
    settings = SamplingSettings(sampler="euler", steps=8, time_shift=PRESETS["lightningdit"].time_shift)
    np.testing.assert_allclose(laid(tiny_pipeline(flow=True), settings), 1 - lightning, atol=1e-6)


def test_the_automatic_shift_is_raes_and_none_is_the_models_own():
    pipeline = tiny_pipeline(flow=True)  # 3 x 16 x 16
    assert shift_of(SamplingSettings(time_shift="auto"), pipeline) == pytest.approx((768 / 4096) ** 0.5)
    assert shift_of(SamplingSettings(), pipeline) == 1
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert shift_of(SamplingSettings(), pipeline) == 3
    assert make_sampler(SamplingSettings(sampler="heun"), pipeline).config.shift == 3
    assert make_sampler(SamplingSettings(sampler="euler", time_shift=1), pipeline).config.shift == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"guidance_interval": (0.5, 0.5)}, "--guidance-interval=.* is not START and STOP with 0 <= START < STOP <= 1"),
        ({"guidance_interval": (0.5, 1.5)}, "--guidance-interval="),
        ({"guidance_interval": "01"}, "--guidance-interval='01' is not"),
        ({"guidance_interval": None}, "--guidance-interval=None is not"),
        ({"time_shift": 0}, r"--time-shift=0 is not None or .* or auto"),
        ({"time_shift": "rae"}, "--time-shift='rae' is not"),
        ({"time_shift": float("inf")}, "--time-shift=inf is not"),
    ],
)
def test_intervals_and_shifts_that_are_none_are_refused_by_their_option(setting, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**setting)


def test_a_shift_is_refused_where_nothing_takes_it():
    with pytest.raises(ValueError, match=r"--time-shift auto: the model is none of a flow.*leave it out"):
        make_sampler(SamplingSettings(sampler="ddim", time_shift="auto"), tiny_pipeline())
    with pytest.raises(ValueError, match="--time-shift 2: the pipeline's own sampler has its own"):
        make_sampler(SamplingSettings(sampler="own", time_shift=2), tiny_pipeline(flow=True))


def test_the_guidance_interval_reaches_the_samples(tmp_path):
    pipeline, batches = tiny_pipeline(flow=True), []
    pipeline.transformer.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    settings = SamplingSettings(
        num_images=2, sampler="euler", steps=10, guidance_scale=2.0, guidance_interval=(0.3, 0.6)
    )
    sample_images(pipeline, settings, tmp_path, Accelerator(cpu=True), 2)
    assert batches == [2] * 3 + [4] * 3 + [2] * 4


def test_samples_of_before_there_were_intervals_and_shifts_go_on(tmp_path):
    pipeline = tiny_pipeline(flow=True)
    settings = SamplingSettings(num_images=2, steps=2, sampler="euler")
    manifest = make_manifest(pipeline, settings)
    manifest["sampling"] = {
        name: value for name, value in manifest["sampling"].items() if name not in ("guidance_interval", "time_shift")
    }
    sampling.claim_samples(tmp_path, manifest)
    assert len(sample_images(pipeline, settings, tmp_path, Accelerator(cpu=True), 2)) == 2
    with pytest.raises(ManifestError, match=r"sampling\.time_shift None -> 2"):
        changed = SamplingSettings(num_images=2, steps=2, sampler="euler", time_shift=2)
        sample_images(pipeline, changed, tmp_path, Accelerator(cpu=True), 2)


def test_no_guidance_is_no_change_of_a_preset_whose_paper_gives_it_too():
    assert preset_changes(with_settings("repa", {"guidance_scale": 1.0}), "repa") == []
    assert preset_changes(with_settings("jit", {"guidance_scale": 1.0}), "jit") == ["guidance_scale: 3 -> 1"]
    assert preset_changes(with_settings("rae", {"guidance_interval": (0.1, 1.0)}), "rae") == []
    assert preset_changes(with_settings("repa", {"guidance_interval": (0.0, 1.0)}), "repa") == [
        "guidance_interval: 0.3 to 1 -> 0 to 1"
    ]
    line = describe_settings(PRESETS["lightningdit"])
    assert "time shift 3.333" in line and "guidance 6.7 on 3 channels from 0.125 to 1 of the way" in line


class Stub:
    """What a comparison looks at."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("preset", "side", "file", "adm", "reasons"),
    [
        ("rae", 256, "VIRTUAL_imagenet256_labeled.npz", True, []),
        ("rae", 512, "VIRTUAL_imagenet512.npz", True, []),
        ("lightningdit", 512, "VIRTUAL_imagenet512.npz", True, ["images are 512 x 512, not 256 x 256"]),
        ("jit", 512, "stats/jit_in512_stats.npz", False, []),
        ("jit", 256, "VIRTUAL_imagenet256_labeled.npz", True,
         ["the reference is not jit_in256_stats.npz, which the scores of preset jit are against"]),
        ("repa", 256, "jit_in256_stats.npz", False, ["the reference is not ADM's file of statistics"]),
    ],
)  # fmt: skip
def test_scores_compare_where_size_and_reference_are_the_papers(preset, side, file, adm, reasons):
    samples = Stub(images=Stub(shape=(50_000, side, side, 3)))
    reference = Stub(name=file, statistics="of the file", adm_statistics=adm)
    extractor = Stub(published=True, name="inception")
    assert why_not_comparable(samples, reference, extractor, PRESETS[preset], preset, 1000) == reasons


def test_the_document_has_the_presets_table(capsys):
    preset_table.main([])
    table = capsys.readouterr().out.strip()
    assert all(table.count(f"\n| `{name}` |") >= 2 for name in PRESETS)
    assert table in (ROOT / "docs" / "fid.md").read_text(encoding="utf-8")


def test_heun_asks_twice_a_step_and_once_in_the_last():
    pipeline = tiny_pipeline(flow=True)
    settings = SamplingSettings(sampler="heun", steps=5, guidance_interval=(0.1, 1.0))
    assert isinstance(make_sampler(settings, pipeline), FlowMatchHeunDiscreteScheduler)
    assert len(laid(pipeline, settings)) == 9
