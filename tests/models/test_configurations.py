"""Configurations as input: every field of every class, with every kind of wrong value, by every way in."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import tiny_model

from d_emo import (
    DEMOTransformer2DModel,
    DiTBaselineTransformer2DModel,
    EMOv2Config,
    EMOv2ForImageClassification,
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchODESolverScheduler,
    FlowMatchSDEHeunScheduler,
    JiTTransformer2DModel,
    LightningDiTTransformer2DModel,
    create_classifier,
    create_model,
)
from d_emo.classification import ranges as classifier_ranges
from d_emo.classification.irmb import make_block
from d_emo.common.block_ranges import BLOCK
from d_emo.common.ranges import Each, Flag, Maybe, OneOf, Real, Rule
from d_emo.models import I2RMB, DiTBlock, RotaryBlock, SpanningWindowAttention, ranges
from d_emo.schedulers import flow_ode, flow_sde

TRANSFORMERS = {DEMOTransformer2DModel: ranges.DEMO, DiTBaselineTransformer2DModel: ranges.DIT,
                LightningDiTTransformer2DModel: ranges.LIGHTNINGDIT, JiTTransformer2DModel: ranges.JIT}  # fmt: skip
SCHEDULERS = {
    FlowMatchODESolverScheduler: flow_ode.RANGES,
    FlowMatchEulerMaruyamaScheduler: flow_sde.RANGES,
    FlowMatchSDEHeunScheduler: flow_sde.RANGES,
}
NETWORK = {name for name in classifier_ranges.CLASSIFIER if name not in ("num_channels", "image_size")}
CONFIG = {name for name in classifier_ranges.CLASSIFIER if name not in ("num_classes", "in_channels")}
BLOCKS = {
    SpanningWindowAttention: ("dim", "num_heads", "expansion", "window_size", "attention_type", "clip_window"),
    I2RMB: ("dim", "num_heads", "expansion", "window_size", "kernel_size", "attention_type", "clip_window", "out_dim"),
    DiTBlock: ("dim", "num_heads", "mlp_ratio", "norm_eps"),
    RotaryBlock: ("dim", "num_heads", "mlp_ratio", "norm_eps"),
    make_block: tuple(name for name in BLOCK if name not in ("mlp_ratio", "norm_eps")),
}
HUGE = 10**12


def wrong_values(rule: Rule) -> list:
    """Values of every wrong kind for a field."""
    if isinstance(rule, Maybe):
        return [value for value in wrong_values(rule.rule) if value is not None]
    wrong = ["", "12", [], {}, math.nan, -math.inf, -1, HUGE, b"2", torch.ones(())]
    if isinstance(rule, Each):
        return [*wrong, None, [math.nan], [HUGE], [[1]], [1] * 9]
    if isinstance(rule, Flag | OneOf):
        return [*wrong, 1 if isinstance(rule, Flag) else "spaning", None]
    return [*wrong, True, *([-1e300, "0.5"] if isinstance(rule, Real) else [0.5, 2.5])]


def fields(table, names=None):
    return [(name, table[name]) for name in table if names is None or name in names]


def allowed(name: str, value) -> bool:
    """The few of these values that a field does take."""
    number = isinstance(value, int) and not isinstance(value, bool)
    return (name == "attending_stages" and value == []) or (
        number and name in ("timestep_offset", "timestep_factor", "layer_scale") and abs(value) < 1e3
    )


def assert_refused(call, owner, name, value):
    with pytest.raises(ValueError, match=rf"^{owner}: {name}=") as refusal:
        call(**{name: value})
    assert "\n" not in str(refusal.value), value


@pytest.mark.parametrize(
    ("call", "owner", "table", "base"),
    [
        *((kind, kind.__name__, table, {}) for kind, table in {**TRANSFORMERS, **SCHEDULERS}.items()),
        (create_classifier, "EMOv2", fields(classifier_ranges.CLASSIFIER, NETWORK), {"name": "EMOv2-1M"}),
        (EMOv2Config, "EMOv2Config", fields(classifier_ranges.CLASSIFIER, CONFIG), {}),
        *((kind, kind.__name__, fields(BLOCK, names), {"dim": 16, "num_heads": 2, **(
            {"mlp_ratio": 4.0, "norm_eps": 1e-6} if kind in (DiTBlock, RotaryBlock) else {})})
            for kind, names in BLOCKS.items()),
    ],
)  # fmt: skip
def test_every_field_refuses_every_wrong_value(call, owner, table, base):
    for name, rule in dict(table).items():
        for value in wrong_values(rule):
            if not allowed(name, value):
                assert_refused(lambda **given: call(**{**base, **given}), owner, name, value)


def edited(folder: Path, file: str, **changes) -> Path:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def written(value) -> bool:
    """Whether JSON has such a value."""
    return not isinstance(value, bytes | torch.Tensor)


@pytest.mark.parametrize("family", ["D-EMOv2", "DiT", "LightningDiT", "JiT"])
def test_constructor_configuration_and_folder_give_the_same_line(family, tmp_path):
    model = tiny_model(family, num_layers=1)
    kind, table = type(model), TRANSFORMERS[type(model)]
    model.save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    for name, rule in table.items():
        for value in wrong_values(rule)[:8]:
            if allowed(name, value):
                continue
            lines = []
            for call in (
                lambda: kind(**{**plain(model.config), name: value}),  # noqa: B023
                lambda: kind.from_config({**plain(model.config), name: value}),  # noqa: B023
                lambda: kind.from_pretrained(edited(tmp_path, "config.json", **{name: value})),  # noqa: B023
            ):
                with pytest.raises(ValueError) as refusal:
                    call()
                lines.append(str(refusal.value))
            (tmp_path / "config.json").write_text(saved)
            assert len(set(lines)) == 1 and lines[0].startswith(f"{kind.__name__}: {name}="), lines


def plain(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_folders_give_the_same_line(kind, tmp_path):
    kind().save_pretrained(tmp_path)
    saved = (tmp_path / "scheduler_config.json").read_text()
    for name, rule in SCHEDULERS[kind].items():
        for value in filter(written, wrong_values(rule)):
            edited(tmp_path, "scheduler_config.json", **{name: value})
            assert_refused(lambda **_: kind.from_pretrained(tmp_path), kind.__name__, name, value)
            assert_refused(lambda **given: kind.from_config(kind().config, **given), kind.__name__, name, value)
            (tmp_path / "scheduler_config.json").write_text(saved)


def test_classifiers_folders_give_the_same_line(tmp_path):
    config = EMOv2Config(depths=(1, 1, 2, 1), widths=(8, 8, 16, 16), head_dims=(8, 8, 8, 8), num_labels=2)
    EMOv2ForImageClassification(config).save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    for name, rule in fields(classifier_ranges.CLASSIFIER, CONFIG):
        for value in filter(written, wrong_values(rule)):
            if not allowed(name, value):
                edited(tmp_path, "config.json", **{name: value})
                for kind in (EMOv2Config, EMOv2ForImageClassification):
                    assert_refused(lambda **_: kind.from_pretrained(tmp_path), "EMOv2Config", name, value)  # noqa: B023
                (tmp_path / "config.json").write_text(saved)
    config.depths = [-1]  # set afterwards, as keyword arguments of from_pretrained are
    with pytest.raises(ValueError, match=r"^EMOv2: depths="):
        EMOv2ForImageClassification(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads=5 does not divide 128"),
        ({"hidden_size": 66, "num_attention_heads": 1}, "hidden_size=66 is not a multiple of 4"),
        ({"hidden_size": 65_536, "num_layers": 1000}, "make about [68]e.13 parameters, above 1e.10; use a smaller"),
        ({"hidden_size": 65_536, "num_attention_heads": 1}, "parameters, above"),
        ({"num_classes": 10_000_000, "hidden_size": 1152, "num_attention_heads": 16}, "parameters, above"),
        ({"sample_size": (65_536, 65_536)}, "parameters, above"),
        ({"sample_size": (16, 15)}, r"sample_size=\(16, 15\) is not a multiple of patch_size=2; use 16 x 14"),
        ({"patch_size": 3}, "sample_size=32 is not a multiple of patch_size=3; use 30 x 30"),
        ({"flow_path": "vp"}, "learn_sigma=True belongs to"),
    ],
)
@pytest.mark.parametrize("family", ["D-EMOv2", "DiT"])
def test_fields_that_do_not_belong_together_are_named(family, overrides, message):
    with pytest.raises(ValueError, match=rf"^(DEMO|DiTBaseline)Transformer2DModel: .*{message}"):
        create_model(f"{family}-N-2", **overrides)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_model("D-EMOv2-N-2", expansion=0.001), "expansion=0.001 leaves no inner channel"),
        (lambda: create_model("DiT-N-2", mlp_ratio=0.001), "mlp_ratio=0.001 leaves no inner channel"),
        (lambda: create_model("DiT-N-2", timestep_factor=0), "timestep_factor=0 hides the time"),
        (
            lambda: create_model("JiT-B-16", mlp_ratio=0.002),
            "mlp_ratio=0.002 leaves no inner channel of hidden_size=768",
        ),
        (
            lambda: create_model("LightningDiT-B-1", num_attention_heads=128),
            "makes heads of 6 channels, .* multiple of 4",
        ),
        (lambda: create_model("LightningDiT-B-1", num_attention_heads=5), "num_attention_heads=5 does not divide 768"),
        (lambda: RotaryBlock(8, 4, 4.0), "num_heads=4 makes heads of 2 channels"),
        (lambda: RotaryBlock(8, 2, 0.125), "mlp_ratio=0.125 leaves no inner channel of dim=8"),
        (lambda: create_model("JiT-B-16", num_layers=3, context_start=3), "beyond the last of num_layers=3 blocks"),
        (
            lambda: create_model(
                "DiT-N-2", patch_size=1024, in_channels=4096, patch_bottleneck=65536, sample_size=1024
            ),
            "parameters, above",
        ),
        (lambda: I2RMB(16, 2, 0.2), "num_heads=2 does not divide 16 and 3 channels"),
        (lambda: create_classifier("EMOv2-1M", head_dims=(16, 16, 90, 20)), r"head_dims\[2\]=90 cuts widths\[2\]=80"),
        (lambda: create_classifier("EMOv2-1M", widths=[65_536] * 4, head_dims=[16] * 4), "parameters, above"),
    ],
)
def test_parts_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_numpys_numbers_are_saved_as_numbers(tmp_path):
    sizes = {"sample_size": np.int64(8), "hidden_size": np.int32(16), "norm_eps": np.float32(1e-6)}
    model = create_model("DiT-N-4", num_layers=1, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert DiTBaselineTransformer2DModel.from_pretrained(tmp_path).config.hidden_size == 16


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"num_inference_steps": value}, "num_inference_steps") for value in (1, 0, -3, 2.5, "10", True, None, HUGE)
    ] + [({"num_inference_steps": 4, "start": value}, "start") for value in (0.0, -1, 1.5, math.nan, "1", 0.04)],
)  # fmt: skip
def test_steps_of_the_stochastic_sampler_are_in_range(arguments, field):
    with pytest.raises(ValueError, match=rf"^FlowMatchEulerMaruyamaScheduler: {field}="):
        FlowMatchEulerMaruyamaScheduler().set_timesteps(**arguments)


@pytest.mark.parametrize(("field", "remedy"), [("window_sise", "is it window_size"), ("zzz", "was it written")])
def test_a_field_that_no_model_has_is_no_default(field, remedy, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    edited(tmp_path, "config.json", **{field: 4, "_a_note": 1})
    with pytest.raises(ValueError, match=rf"config.json has '{field}', which no DEMOTransformer2DModel has; {remedy}"):
        DEMOTransformer2DModel.from_pretrained(tmp_path)
