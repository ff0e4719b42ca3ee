"""Training on one of each 2 x 2 tokens: what is drawn, resuming, going on without, what is refused."""

import json

import pytest
import torch
from accelerate import Accelerator
from helpers.paths import ROOT
from helpers.pipelines import tiny_pipeline
from helpers.training import TINY, assert_two_processes_train_as_one, run_here, train_in_parts, train_to_the_end

from d_emo import DEMOPipeline
from d_emo.train.data.sources import load_source
from d_emo.train.diffusion.config import parse_config
from d_emo.train.diffusion.draws import Draws
from d_emo.train.diffusion.plan import make_plan

DROPPING = ("--dense-blocks", "1", "--drop-tokens", "true", "--drop-pause", "3")


def draws_of(*arguments):
    config = parse_config(["--config", str(ROOT / "train/configs/digits.yaml"), *map(str, arguments)])
    return Draws(make_plan(config, load_source(config.data), Accelerator(cpu=True)), torch.device("cpu"))


def test_kept_tokens_are_functions_of_seed_and_position():
    draws = draws_of(*DROPPING, "--global-batch-size", "64", "--micro-batch-size", "64")
    first = 64  # of the second step
    kept = draws.of(range(first, first + 64))["kept"]
    assert kept.shape == (64, 2, 2) and torch.equal(kept.unique(), torch.arange(4, dtype=torch.uint8))
    assert torch.equal(draws.of(range(first + 7, first + 9))["kept"], kept[7:9])
    other = draws_of(*DROPPING, "--global-batch-size", "64", "--micro-batch-size", "64", "--seed", "1")
    assert not torch.equal(other.of(range(first, first + 64))["kept"], kept)
    # the first of three steps has all tokens, so that statistics are there from the beginning
    assert ["kept" in draws.of(range(64 * step, 64 * step + 2)) for step in range(6)] == [False, True, True] * 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_resumes_bit_for_bit_and_goes_on_without_dropping(tmp_path, capsys, processes):
    tuned = tmp_path / "tuned"
    whole = train_in_parts(capsys, tmp_path, *TINY, *DROPPING, processes=processes)
    card = (whole / "README.md").read_text()
    assert "| drop_tokens | True |" in card and "| dense_blocks | 1 |" in card
    train_to_the_end(
        capsys, tmp_path / "log", *TINY, "--init-from", whole, "--max-train-steps", "1", "--output-dir", tuned,
        processes=processes,
    )  # fmt: skip
    assert DEMOPipeline.from_pretrained(tuned).transformer.config.dense_blocks == 1
    assert json.loads((tuned / "run.json").read_text())["drop_tokens"] is False


@pytest.mark.slow
def test_two_processes_drop_as_one_does(tmp_path, capsys):
    assert_two_processes_train_as_one(capsys, tmp_path, *TINY, *DROPPING, "--max-train-steps", "4")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--drop-tokens", "true"), "it needs a network with --dense-blocks, such as 2"),
        (("--drop-pause", "4"), "it goes with --drop-tokens"),
        ((*DROPPING, "--drop-pause", "1"), "must be 2 or more"),
        (("--dense-blocks", "3"), "leave none of num_layers=6 between; use 1 to 2"),
        (("--dense-blocks", "1", "--model", "LightningDiT-B-2"), "D-EMOv2 and DiT can fuse tokens"),
        ((*DROPPING, "--resolution", "20"), "5 x 5 tokens"),
        ((*DROPPING, "--objective", "flow-map"), "flow maps are trained on all tokens"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(tmp_path, capsys, arguments, said):
    code, printed = run_here(
        capsys, "--config", ROOT / "train/configs/digits.yaml", *arguments, "--output-dir", tmp_path / "run"
    )
    assert code and said in printed, printed
    assert not (tmp_path / "run").exists()


def test_trained_weights_without_a_fusion_get_none(tmp_path, capsys):
    tiny_pipeline(flow=True, in_channels=1, num_classes=10).save_pretrained(tmp_path / "plain")
    code, printed = run_here(
        capsys, "--objective", "sit", "--init-from", tmp_path / "plain", *DROPPING, "--output-dir", tmp_path / "run"
    )
    assert code and "dense_blocks None, not 1" in printed
