"""Every model that comes with the package: its files, types and sizes, what loads it, what its card says."""

import json
import re
import shlex
import subprocess

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from helpers.paths import ROOT
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification
from transformers import pipeline as task

import d_emo
from d_emo.train.classification.config import parse_classifier_config
from d_emo.train.diffusion.config import parse_config

NAMES = d_emo.list_packaged()
MOST_BYTES = 14_000_000
# What a folder may hold; nothing that could run code.
SUFFIXES = {".json", ".md", ".png", ".safetensors"}
PARSERS = {"train_dit": parse_config, "train_classifier": parse_classifier_config}


def load(name, **options):
    """A packaged model's network, and the pipeline around it if there is one."""
    folder = d_emo.packaged(name)
    if (folder / "model_index.json").is_file():
        pipeline = d_emo.DEMOPipeline.from_pretrained(folder, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.transformer, pipeline
    return AutoModelForImageClassification.from_pretrained(folder, **options).eval(), None


def card(name):
    return (d_emo.packaged(name) / "README.md").read_text(encoding="utf-8")


def test_there_are_the_digits_and_their_classifier():
    assert {"digits", "digits-classifier"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_small_and_holds_no_code(name):
    files = [path for path in d_emo.packaged(name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= SUFFIXES
    assert sum(path.stat().st_size for path in files) < MOST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_types_in_the_file_are_float16_but_for_batch_norm_and_positions(name):
    network, _ = load(name)
    kept = {
        f"{path}.{part}"
        for path, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for part in ("weight", "bias", "running_mean", "running_var")
    } | {"pos_embed"}
    (file,) = d_emo.packaged(name).rglob("*.safetensors")
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    found = {tensor: entry["dtype"] for tensor, entry in header.items() if tensor != "__metadata__"}
    assert found == {
        tensor: "I64" if tensor.endswith("num_batches_tracked") else "F32" if tensor in kept else "F16"
        for tensor in network.state_dict()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_model_loads_as_float32_and_has_seen_data(name):
    state = load(name)[0].state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert all(int(tensor) > 0 for key, tensor in state.items() if key.endswith("num_batches_tracked"))


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_the_hub_reads_and_the_commands_that_made_it(name):
    text = card(name)
    fields = yaml.safe_load(text.split("---\n")[1])
    assert {"license", "library_name", "pipeline_tag", "tags"} <= set(fields)
    assert f'd_emo.packaged("{name}")' in text and "## Scores" in text and "## Licence" in text
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (d_emo.packaged(name) / picture).is_file(), picture
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("accelerate launch")]
    assert commands
    for _, _, _, module, *words in commands:
        PARSERS[module.rpartition(".")[2]](words, "")
    assert not re.search(r"/(home|work|tmp|root)/", text)


def test_the_digits_draw_what_the_classifier_reads():
    _, pipeline = load("digits")
    classify = task("image-classification", str(d_emo.packaged("digits-classifier")))
    names = [name for name in pipeline.id2label.values() for _ in range(2)]
    generators = [torch.Generator().manual_seed(number) for number in range(len(names))]
    images = pipeline(names, num_inference_steps=20, generator=generators).images
    answers = [answer[0]["label"] for answer in classify([image.convert("RGB") for image in images], top_k=1)]
    assert sum(map(str.__eq__, names, answers)) >= 0.9 * len(names)


def test_diffusers_and_transformers_load_them_by_their_own_classes():
    pipeline = DiffusionPipeline.from_pretrained(d_emo.packaged("digits"))
    assert type(pipeline) is d_emo.DEMOPipeline and pipeline.transformer.dtype == torch.float32
    half = DiffusionPipeline.from_pretrained(d_emo.packaged("digits"), dtype=torch.float16).transformer
    assert half.proj_out.weight.dtype == torch.float16 and half.pos_embed.dtype == torch.float32
    assert type(AutoModel.from_pretrained(d_emo.packaged("digits-classifier"))) is d_emo.EMOv2Model


def test_git_takes_weights_and_pictures_as_they_are():
    files = [str(path) for name in NAMES for path in d_emo.packaged(name).rglob("*") if path.suffix in SUFFIXES]
    binary = {path for path in files if path.endswith((".safetensors", ".png"))}
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    told = subprocess.run(["git", "check-attr", "text", *files], cwd=ROOT, capture_output=True, text=True, check=True)
    unset = {line.removesuffix(": text: unset") for line in told.stdout.splitlines() if line.endswith(": text: unset")}
    assert unset == binary
