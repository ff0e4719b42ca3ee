"""The configurations of latent spaces and pixels: each makes a plan, with the sizes that its comments promise."""

import re

import pytest
import torch
from helpers.autoencoders import tiny_autoencoder
from helpers.made import write_pictures
from helpers.paths import ROOT
from helpers.training import run_here

from d_emo.models import create_model
from d_emo.models.flops import count_parameters
from d_emo.schedulers.flow_paths import dimension_shift
from d_emo.train.diffusion.config import parse_config

CONFIGS = ROOT / "train" / "configs"
# By file: the class of its autoencoder, a size that the tiny one takes, latents (C, h, w) and patch of the real one.
SPACES = {
    "imagenet256-rae": ("AutoencoderRAE", 32, (768, 16, 16)),
    "imagenet256-vavae": ("AutoencoderKL per channel", 32, (32, 16, 16)),
    "imagenet256-pixels": (None, 32, (3, 256, 256)),
    "imagenet512-dc": ("AutoencoderDC", 32, (32, 16, 16)),
}
QUICK = ("imagenet256-pixels", "imagenet512-dc")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SPACES]
)
def test_a_configuration_makes_a_plan_that_says_what_the_run_takes(name, tmp_path, capsys):
    kind, side, _ = SPACES[name]
    given = ["--train-data-dir", write_pictures(tmp_path / "pictures"), "--resolution", side, "--num-workers", 0]
    if kind:
        tiny_autoencoder(kind).save_pretrained(tmp_path / "vae")
        given += ["--vae", tmp_path / "vae"]
    given += ["--micro-batch-size", 2, "--global-batch-size", 2, "--output-dir", tmp_path / "run", "--dry-run"]
    code, output = run_here(capsys, "--config", CONFIGS / f"{name}.yaml", *given)
    assert code == 0, output
    for said in (r"[\d,]+ parameters, [\d.]+ GMACs", r"memory +about", r"activations"):
        assert re.search(said, output), output
    assert ("once by train/encode_latents.py" in output) == (kind is not None)


def test_the_real_sizes_are_those_that_the_files_promise():
    counts = {}
    for name, (_, _, (channels, height, _)) in SPACES.items():
        config = parse_config(["--config", str(CONFIGS / f"{name}.yaml"), "--train-data-dir", "imagenet/train"])
        assert config.optimization.objective == "sit" and config.run.global_batch_size == 1024
        assert config.model.resolution == int(name[8:11])
        bottleneck = (
            {} if config.model.patch_bottleneck is None else {"patch_bottleneck": config.model.patch_bottleneck}
        )
        with torch.device("meta"):
            model = create_model(
                config.model.model, sample_size=height, in_channels=channels, learn_sigma=False,
                prediction_type="flow_prediction", **bottleneck,
            )  # fmt: skip
        assert (height // model.config.patch_size) ** 2 == 256  # tokens, as ImageNet 256 has with the SD VAE at patch 2
        counts[name] = count_parameters(model)
    assert {name: round(count / 1e6, 1) for name, count in counts.items()} == {
        "imagenet256-rae": 97.2, "imagenet256-vavae": 96.1, "imagenet256-pixels": 96.8, "imagenet512-dc": 96.1,
    }  # fmt: skip
    assert dimension_shift(768 * 16 * 16) == pytest.approx(6.928, abs=1e-3)
