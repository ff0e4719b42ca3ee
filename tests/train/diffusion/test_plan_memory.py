"""What plans say of memory and disk before a run and before encoding."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from helpers.made import write_pictures, write_vae
from helpers.models import tiny_model
from helpers.training import TINY, run_here

from d_emo.common.messages import readable_size
from d_emo.images.autoencoders import LatentSpace, open_vae
from d_emo.images.latent_cache import LatentCache
from d_emo.models.flops import count_macs, macs_of
from d_emo.train import encode_latents, train_classifier
from d_emo.train.data.sources import load_source
from d_emo.train.diffusion.config import parse_config
from d_emo.train.diffusion.encode_plan import describe_cache
from d_emo.train.diffusion.memory import DiffusionStep
from d_emo.train.diffusion.plan import make_plan
from d_emo.train.engine import fit
from d_emo.train.engine.memory import Launch
from d_emo.train.engine.rehearsal import held_at_most, shapes_only


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures, and a VAE that halves each side."""
    folder = tmp_path_factory.mktemp("made")
    return write_pictures(folder / "pictures"), write_vae(folder / "vae")


def line(output, name):
    """The plan's line of a name."""
    found = re.search(rf"^  {name} +(.*)$", output, flags=re.MULTILINE)
    assert found, output
    return found[1]


def encode_arguments(made, folder, *more):
    pictures, vae = made
    data = ("--train-data-dir", pictures, "--vae", vae, "--resolution", 16, "--num-workers", 0)
    return (*data, "--output-dir", folder, "--batch-size", 3, *more)


def test_a_plan_says_what_a_step_holds(tmp_path, capsys):
    code, output = run_here(capsys, *TINY, "--dry-run", "--output-dir", tmp_path / "run")
    assert code == 0, output
    memory = line(output, "memory")
    parts = ("weights", "gradients", "AdamW", "average", "activations")
    assert all(re.search(rf"{part} [\d.]+ [KMG]iB", memory) for part in parts), memory
    assert "(micro batch 8; " in memory and "with --gradient-checkpointing true)" in memory
    assert "autoencoder" not in memory and "encode_latents" not in output
    code, output = run_here(capsys, *TINY, "--gradient-checkpointing", "true", "--dry-run", "--output-dir", tmp_path)
    kept = re.search(r"activations (\S+ \S+)", line(output, "memory"))
    assert code == 0 and f"; {kept[1]} with" in memory  # as the first plan had said
    assert "with --gradient-checkpointing" not in output


def test_a_plan_says_what_encoding_in_every_epoch_takes_and_what_encoding_once_would(made, tmp_path, capsys):
    pictures, vae = made
    data = ("--train-data-dir", pictures, "--vae", vae, "--resolution", 16)
    code, output = run_here(capsys, *TINY, *data, "--dry-run", "--output-dir", tmp_path / "run")
    assert code == 0, output
    found = re.search(r"once by train/encode_latents.py: (\d+) images x 2 views = (.+) in float32", output)
    assert encode_latents_size(made, tmp_path, capsys) == (int(found[1]), found[2])
    memory = line(output, "memory")
    assert "autoencoder" in memory and "before them" in memory
    code, output = run_here(capsys, *TINY, "--vae", vae, "--latents", tmp_path / "latents", "--dry-run")
    assert code == 0 and "encode_latents" not in output
    assert "autoencoder" in line(output, "memory") and "before them" not in output


@pytest.mark.slow
def test_the_length_of_a_run_counts_the_images_that_it_encodes(made, tmp_path, monkeypatch):
    pictures, vae = made
    encode_latents.main([str(word) for word in encode_arguments(made, tmp_path / "latents")])
    monkeypatch.setattr(fit, "time_on_cpu", lambda macs, device: f"{macs:.0f} MACs")
    encoder = macs_of(lambda: open_vae(str(vae)).encode(torch.zeros(1, 3, 16, 16)))
    cases = (
        (encoder, ("--train-data-dir", pictures, "--vae", vae, "--resolution", 16)),
        (0, ("--latents", tmp_path / "latents", "--vae", vae)),
    )
    for before, words in cases:
        config = parse_config([str(word) for word in (*TINY, *words, "--max-train-steps", 5)])
        plan = make_plan(config, load_source(config.data), Accelerator(cpu=True))
        total = 5 * 8 * (3 * count_macs(plan.build_model()) + before)
        assert encoder > 1e5 and line(plan.describe(), "length").endswith(f"{total:.0f} MACs")
    assert fit.time_of_training(10, 100, Launch(torch.device("cpu"), processes=2), encoding=4) == "1700 MACs"


def encode_latents_size(made, tmp_path, capsys):
    """Images, and the size of their latents on the disk as the plan puts it."""
    code, output = run_here(capsys, *encode_arguments(made, tmp_path / "latents"), main=encode_latents.main)
    assert code == 0, output
    manifest = LatentCache(tmp_path / "latents").manifest
    stored = sum(path.stat().st_size - 128 for path in (tmp_path / "latents").glob("latents-*.npy"))
    assert stored == manifest.count * manifest.image_bytes  # NumPy's header has 128 bytes
    return manifest.count, readable_size(stored)


def test_imagenet_at_256_pixels_takes_78_gib():
    """1,281,167 x 2 views x 2 values x 4 x 32 x 32 x 4 bytes = 83,962,560,512."""
    drawn = LatentSpace(autoencoder="AutoencoderKL", channels=4, factor=8)
    size = describe_cache(drawn, 1_281_167, 2, (4, 32, 32), "float32")
    assert size.startswith("1,281,167 images x 2 views = 78 GiB in f")
    size = describe_cache(drawn, 1_281_167, 1, (4, 32, 32), "float16")
    assert size == "1,281,167 images x 1 view = 20 GiB in float16"
    size = describe_cache(replace(drawn, deterministic=True), 1_281_167, 1, (4, 32, 32), "float16")
    assert size == "1,281,167 images x 1 view = 9.8 GiB in float16"


def test_encoding_says_what_it_takes_and_a_dry_run_writes_nothing(made, tmp_path, capsys):
    folder = tmp_path / "latents"
    code, output = run_here(capsys, *encode_arguments(made, folder, "--dry-run"), main=encode_latents.main)
    assert code == 0 and not folder.exists(), output
    assert re.search(r"\d+ images x 2 views = .* in float32 \(half with --dtype float16\); .* free", output)
    assert re.search(r"GMACs a view, \d+ to encode, roughly 1 min on this CPU; about .*iB of tensors", output)
    code, output = run_here(capsys, *encode_arguments(made, folder), main=encode_latents.main)
    assert code == 0 and "GMACs a view" in output
    again = run_here(capsys, *encode_arguments(made, folder, "--dry-run"), main=encode_latents.main)[1]
    assert "of it there already" in again and ", 0 to encode; about" in again


def test_encoding_refuses_a_disk_that_is_too_small(made, tmp_path, capsys, monkeypatch):
    whole = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: whole._replace(free=1000))
    folder = tmp_path / "latents"
    code, output = run_here(capsys, *encode_arguments(made, folder), main=encode_latents.main)
    assert code != 0 and not folder.exists()
    assert re.search(r"--output-dir .*latents that are not there yet take .*, 1.0 KiB are free; make room", output)
    assert "or halve it with --dtype float16" in output
    code, output = run_here(capsys, *encode_arguments(made, folder, "--dry-run"), main=encode_latents.main)
    assert code != 0 and "1.0 KiB free" in output and "make room" in output  # the plan, then what it says of it


def test_an_encoder_without_content_holds_what_it_holds_with_it(made):
    vae = open_vae(str(made[1])).requires_grad_(False).eval()
    images = torch.zeros(3, 3, 16, 16)
    with torch.no_grad():
        real = held_at_most(lambda: vae.encode(images))
        with shapes_only(torch.device("cpu"), vae):
            planned = held_at_most(lambda: vae.encode(torch.empty(3, 3, 16, 16)))
    assert planned == pytest.approx(real, abs=images.nbytes) and real > 10 * images.nbytes


def test_a_plain_copy_of_the_average_counts_with_it():
    model = tiny_model().train()
    alone, beside = (
        DiffusionStep(
            model=model, plain=plain, optimizer="AdamW", followed=0,
            make_optimizer=lambda module: torch.optim.AdamW(module.parameters()),
            launch=Launch(torch.device("cpu")), micro_batch=2, vae=None, images=None,
        ).memory(False)
        for plain in (None, model)
    )  # fmt: skip
    assert beside.average == 2 * alone.average == 2 * alone.weights


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--optimizer", "lion"), "lion"), (("--optimizer", "muon"), "; without muon's state)")],
    ids=["counted", "not counted"],
)
def test_a_classifiers_plan_says_what_a_step_holds(arguments, said, tmp_path, capsys):
    more = ("--dry-run", "--output-dir", tmp_path, *arguments)
    code, output = run_here(capsys, "--model", "EMOv2-1M", *more, main=train_classifier.main)
    assert code == 0, output
    memory = line(output, "memory")
    assert said in memory and re.search(r"activations \S+ MiB \(micro batch \d+", memory)
