"""The launch configurations that ship: Accelerate reads them, and they say what they claim."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers.paths import ROOT
from helpers.training import TINY, run_here

from d_emo.common.processes import LaunchError, start_processes
from d_emo.train.diffusion.config import TrainConfig
from d_emo.train.engine import start
from d_emo.train.engine.options import RunOptions

CONFIGS = ROOT / "train" / "configs" / "accelerate"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_them(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.num_processes == 8 * config.num_machines
    assert config.mixed_precision == "bf16"
    assert config.distributed_type == ("FSDP" if path.stem == "fsdp2" else "MULTI_GPU")


def test_the_sharding_configuration_makes_the_plugin_that_the_tests_use(monkeypatch):
    from accelerate.commands.launch import _validate_launch_command

    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(CONFIGS / "fsdp2.yaml"), "train/train_dit.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith(("FSDP", "ACCELERATE")):
            monkeypatch.setenv(name, value)
    from d_emo.common.processes import _fsdp_plugin

    plugin = _fsdp_plugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "SHARDED" in str(plugin.state_dict_type)
    assert plugin.mixed_precision_policy.param_dtype is None
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"


def test_what_is_not_supported_is_refused_with_what_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    code, printed = run_here(capsys, *TINY, "--output-dir", tmp_path / "run")
    assert code != 0 and "DeepSpeed is not supported" in printed and "fsdp2.yaml" in printed
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(LaunchError, match="FSDP version 1 is not supported; set fsdp_version: 2"):
        start_processes()


@pytest.mark.parametrize(
    ("device", "mixed_precision", "matmul", "told"),
    [
        ("cpu", "no", "highest", ""),
        ("cuda", "no", "high", "float32, products in TF32; --mixed-precision bf16 is"),
        ("cuda", "bf16", "high", "products in bfloat16 (autocast)"),
    ],
)
def test_a_gpu_computes_in_what_the_plan_says(monkeypatch, tmp_path, device, mixed_precision, matmul, told):
    made = SimpleNamespace(device=torch.device(device), mixed_precision=mixed_precision)
    monkeypatch.setattr(start, "start_processes", lambda *_, **__: made)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    before = torch.get_float32_matmul_precision()
    try:
        start.make_accelerator(RunOptions(), None, tmp_path)
        assert torch.get_float32_matmul_precision() == matmul
    finally:
        torch.set_float32_matmul_precision(before)
    said = start.describe_precision(device, mixed_precision)
    assert said.startswith(told) and bool(said) == bool(told)


@pytest.mark.parametrize(
    ("asked", "launch", "has", "cpu", "given"),
    [
        (None, None, True, None, "bf16"),
        (None, "no", True, None, "bf16"),  # as `accelerate launch` says where nobody chose
        ("no", "no", True, None, "no"),
        ("bf16", None, False, None, "bf16"),
        (None, None, False, None, None),  # a GPU of before 2020: nothing is emulated
        (None, "fp16", True, None, None),  # refused later, by its name
        (None, "no", True, "true", None),
    ],
)
def test_a_gpu_computes_in_bfloat16_unless_something_else_is_said(
    monkeypatch, tmp_path, asked, launch, has, cpu, given
):
    seen = {}

    def started(*_, mixed_precision, **__):
        seen["given"] = mixed_precision
        return SimpleNamespace(device=torch.device("cpu"), mixed_precision=mixed_precision or "no")

    for name, value in (("ACCELERATE_MIXED_PRECISION", launch), ("ACCELERATE_USE_CPU", cpu)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(start, "start_processes", started)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda number: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    start.make_accelerator(RunOptions(), asked, tmp_path)
    assert seen["given"] == given
    start.make_accelerator(RunOptions(), asked, tmp_path, on_gpus=True)  # what is planned for are GPUs that have it
    assert seen["given"] == (asked or "bf16")
    for stored in ("no", "bf16", None):  # of a run that is gone on with; None of one of before
        (tmp_path / "run.json").write_text(json.dumps({"mixed_precision": stored, "seed": 0}))
        start.make_accelerator(RunOptions(resume_from="latest"), asked, tmp_path)
        assert seen["given"] == (asked or stored)


def test_a_precision_that_was_chosen_is_among_the_options_as_if_it_had_been_named():
    config = TrainConfig()
    assert config.optimization.mixed_precision is None
    chosen = start.with_precision(config, SimpleNamespace(mixed_precision="bf16"))
    assert {**config.flat(), "mixed_precision": "bf16"} == chosen.flat()
    assert start.with_precision(config, SimpleNamespace(mixed_precision="no")) is config
