"""Files of adapters that do not fit wholly: each kind is refused, and the pipeline stays as it was."""

import json

import pytest
import torch
from helpers.pipelines import images, tiny_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d_emo.models.variants import create_model
from d_emo.pipelines.lora import ADAPTERS, BESIDE, LABELS, write_adapters

pytest.importorskip("peft", reason="needs the extra lora")


@pytest.fixture
def folder(tmp_path):
    """A run's adapters on the network of `tiny_pipeline`."""
    from peft import LoraConfig

    pipeline = tiny_pipeline(flow=True)
    model = pipeline.transformer
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=r"blocks\.\d+\.modulation", init_lora_weights=False))
    write_adapters(tmp_path / "lora", model, pipeline.id2label, "base")
    return tmp_path / "lora"


def changed(path, change, about=None):
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    if about is not None:
        metadata["about"] = json.dumps({**json.loads(metadata["about"]), **about})
    state = load_file(path)
    change(state)
    save_file(state, path, metadata=metadata)


A, B = (f"transformer.blocks.0.modulation.lora_{part}.weight" for part in "AB")


def test_a_whole_file_loads(folder):
    pipeline = tiny_pipeline(flow=True)
    plain = images(pipeline)
    pipeline.load_lora_weights(folder)
    assert (images(pipeline) - plain).abs().max() > 1e-3
    pipeline.unload_lora_weights()
    torch.testing.assert_close(images(pipeline), plain, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("file", "change", "about", "message"),
    [
        (ADAPTERS, lambda state: state.pop(B), None, r"missing in the file: blocks.0.modulation.lora_B.weight"),
        (ADAPTERS, lambda state: (state.pop(A), state.pop(B)), None, "adapters of blocks.0.modulation are missing in"),
        (ADAPTERS, lambda state: state.update({"transformer.more": torch.ones(1)}), None, "not in the model: more"),
        (ADAPTERS, lambda state: state.update({A: torch.ones(2, 9)}), None, "no layer .* of its size is here"),
        (ADAPTERS, lambda state: state.update({B: torch.ones(9, 2)}), None, "size mismatch|shape|[Ee]rror"),
        (ADAPTERS, lambda state: state.clear(), None, "trained on another pipeline|no key"),
        (BESIDE, lambda state: state.pop("pos_embed"), None, "its files are damaged .*holds label_embed.weight"),
        (BESIDE, lambda state: state.update(more=torch.ones(1)), None, "its files are damaged .*more"),
        (BESIDE, lambda state: state.update({LABELS: torch.ones(9, 32)}), None, r"\(9, 32\), not \(4, 32\)"),
        (BESIDE, lambda state: state.update(pos_embed=torch.ones(8, 8, 3)), None, r"\(8, 8, 3\), not \(8, 8, 32\)"),
        (BESIDE, lambda state: None, {"num_classes": -1}, "num_classes=-1 is not a whole number"),
        (BESIDE, lambda state: None, {"num_classes": 7}, r"\(4, 32\), not \(8, 32\)"),
        (BESIDE, lambda state: None, {"sample_size": "16"}, "sample_size='16' is not"),
        (BESIDE, lambda state: None, {"id2label": [1]}, "its files are damaged"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_leaves_no_trace(folder, file, change, about, message):
    changed(folder / file, change, about)
    pipeline = tiny_pipeline(flow=True)
    before = images(pipeline)
    with pytest.raises(ValueError, match=message) as refusal:
        pipeline.load_lora_weights(folder)
    assert "\n" not in str(refusal.value)
    assert not getattr(pipeline.transformer, "peft_config", None)
    torch.testing.assert_close(images(pipeline), before, atol=0, rtol=0)


def described(folder, **changes):
    """The file with another description."""
    with safe_open(folder / ADAPTERS, framework="pt") as file:
        metadata = dict(file.metadata())
    (key,) = (key for key in metadata if key != "format")
    about = {**json.loads(metadata[key]), **{f"transformer.{name}": value for name, value in changes.items()}}
    save_file(load_file(folder / ADAPTERS), folder / ADAPTERS, metadata={**metadata, key: json.dumps(about)})


@pytest.mark.parametrize("own_way", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"r": rank}, rf"r={rank!r} is not a whole number from 1 to 2") for rank in (0, 10**9, "2", None, 3)),
        ({"rank_pattern": {"modulation": 10**9}}, "modulation=1000000000 is not a whole number from 1 to 2"),
        ({"rank_pattern": [3]}, r"rank_pattern=\[3\]"),
        ({"r": 1}, "size mismatch|shape"),
        ({"target_modules": "("}, "."),
        ({"target_modules": 3}, "."),
        ({"no_such_field": 3}, "could not be instantiated"),
    ],
)
def test_a_description_of_other_adapters_is_refused(folder, changes, message, own_way):
    described(folder, **changes)
    pipeline = tiny_pipeline(flow=True)
    with pytest.raises(ValueError, match=message) as refusal:
        if own_way:
            pipeline.transformer.load_lora_adapter(folder, weight_name=ADAPTERS)
        else:
            pipeline.load_lora_weights(folder)
    assert "\n" not in str(refusal.value) and not getattr(pipeline.transformer, "peft_config", None)


def test_a_second_adapter_goes_beside_the_first(folder):
    described(folder, target_modules=r"blocks\..*modulation.*")
    model = tiny_pipeline(flow=True).transformer
    for name in ("one", "two"):
        model.load_lora_adapter(folder, weight_name=ADAPTERS, adapter_name=name)
    assert set(model.peft_config) == {"one", "two"}


def test_diffusers_own_way_is_strict_too(folder):
    changed(folder / ADAPTERS, lambda state: state.pop(B))
    model = create_model("D-EMOv2-S-2", sample_size=16, hidden_size=32, num_layers=2, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"missing in the file: blocks.0.modulation.lora_B.weight"):
        model.load_lora_adapter(folder, weight_name=ADAPTERS)
