"""Saving in float16: which tensors stay float32, read from the files' own headers; what a folder gives when loaded."""

import json

import pytest
import torch
from helpers.classifiers import TINY_NETWORK
from helpers.models import randomize
from helpers.pipelines import images, tiny_pipeline, tiny_vae
from torch import nn

from d_emo import DEMOPipeline, EMOv2Config, EMOv2ForImageClassification, save_float16
from d_emo.common.float16 import stays_float32


def types_in(file):
    """The type of each tensor by name, as the file's header says: eight bytes of length, then JSON."""
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def expected_types(model):
    """The same, by what the network's modules are."""
    kept = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, _ in [*module.named_parameters(), *module.named_buffers()]
    }
    return {
        name: "I64" if tensor.dtype == torch.int64 else "F32" if name in kept or name == "pos_embed" else "F16"
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline(flow=True)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    """A pipeline of flow matching in float16."""
    folder = tmp_path_factory.mktemp("half") / "pipeline"
    save_float16(pipeline, folder)
    return folder


def test_batch_norm_and_positions_stay_float32_and_all_else_is_float16(pipeline, folder):
    found = types_in(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found == expected_types(pipeline.transformer)
    assert set(found.values()) == {"F16", "F32", "I64"}


def test_the_folder_loads_as_float32_unless_another_type_is_asked_for(pipeline, folder):
    loaded = DEMOPipeline.from_pretrained(folder).transformer
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32, torch.int64}
    half = DEMOPipeline.from_pretrained(folder, dtype=torch.float16).transformer
    in_half = {name: tensor.dtype for name, tensor in half.state_dict().items()}
    names = {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
    assert in_half == {name: names[kind] for name, kind in expected_types(pipeline.transformer).items()}
    saved = pipeline.transformer.state_dict()
    for name, tensor in loaded.state_dict().items():
        if in_half[name] == torch.float16:
            torch.testing.assert_close(tensor, saved[name], rtol=2**-11, atol=2**-25)
            assert torch.equal(tensor, half.state_dict()[name].float())
        else:
            assert torch.equal(tensor, saved[name]), name


def test_images_differ_by_no_more_than_rounded_weights_explain(pipeline, folder):
    before, after = images(pipeline), images(DEMOPipeline.from_pretrained(folder))
    assert 0 < (before - after).abs().max() < 1e-2 * before.abs().max()


def test_an_autoencoder_in_the_pipeline_is_saved_so_too(tmp_path):
    pipeline = tiny_pipeline(in_channels=4)
    pipeline.register_modules(vae=tiny_vae())
    save_float16(pipeline, tmp_path / "half")
    assert set(types_in(tmp_path / "half" / "vae" / "diffusion_pytorch_model.safetensors").values()) == {"F16"}


def test_a_classifier_of_transformers_keeps_its_batch_norm_and_loads_as_float32(tmp_path):
    model = randomize(EMOv2ForImageClassification(EMOv2Config(**json.loads(TINY_NETWORK), image_size=32))).eval()
    save_float16(model, tmp_path / "half")
    assert types_in(tmp_path / "half" / "model.safetensors") == expected_types(model)
    loaded = EMOv2ForImageClassification.from_pretrained(tmp_path / "half").eval()
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32, torch.int64}
    picture = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(picture).logits, model(picture).logits, rtol=0, atol=1e-2)


@pytest.mark.parametrize("number", [1e5, -7e4])
def test_what_float16_cannot_hold_stays_float32(tmp_path, number):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.transformer.proj_out.bias[0] = number
    save_float16(pipeline, tmp_path / "half")
    found = types_in(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found["proj_out.bias"] == "F32" and found["proj_out.weight"] == "F16"
    assert DEMOPipeline.from_pretrained(tmp_path / "half").transformer.proj_out.bias[0] == number


def test_models_in_several_files_stay_whole(tmp_path, monkeypatch):
    class Sharded:
        """A network whose BatchNorm lies in two files."""

        def save_pretrained(self, folder):
            pipeline.transformer.save_pretrained(folder, max_shard_size="20KB")

    pipeline = tiny_pipeline()
    save_float16(Sharded(), tmp_path / "half")
    files = sorted((tmp_path / "half").glob("*.safetensors"))
    assert len(files) > 2
    found = {name: kind for file in files for name, kind in types_in(file).items()}
    assert found == expected_types(pipeline.transformer)
    (index,) = (tmp_path / "half").glob("*.index.json")
    bytes_of = {"F16": 2, "F32": 4, "I64": 8}
    state = pipeline.transformer.state_dict()
    total = json.loads(index.read_text())["metadata"]["total_size"]
    assert total == sum(bytes_of[found[name]] * tensor.numel() for name, tensor in state.items())
    loaded = type(pipeline.transformer).from_pretrained(tmp_path / "half")
    assert loaded.state_dict().keys() == state.keys()


def test_names_tell_a_module_with_statistics_from_its_neighbours():
    names = {"norm.weight", "norm.running_var", "norm.running_mean", "norm2.weight", "running_var", "bias"}
    assert stays_float32("norm.weight", names) and stays_float32("bias", names)
    assert not stays_float32("norm2.weight", names - {"running_var"})
    assert stays_float32("encoder.pos_embed", {"encoder.pos_embed"})
    assert not stays_float32("pos_embed.weight", {"pos_embed.weight"})


def test_a_folder_with_something_in_it_is_refused_and_left_alone(pipeline, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"folder='.*' is not empty; choose a new one\."):
        save_float16(pipeline, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_saves_no_safetensors_is_refused_and_leaves_nothing(tmp_path):
    class Other:
        def save_pretrained(self, folder):
            (folder / "weights.bin").write_bytes(b"")

    with pytest.raises(ValueError, match="model is a Linear without save_pretrained; pass a pipeline or a model"):
        save_float16(nn.Linear(1, 1), tmp_path / "out")
    with pytest.raises(ValueError, match="model=Other saved no safetensors"):
        save_float16(Other(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
