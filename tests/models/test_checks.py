"""What the diffusion transformers refuse: inputs of other shapes and kinds, folders of other or of half a network."""

import json
import warnings

import pytest
import torch
from diffusers import DiTTransformer2DModel
from helpers.models import tiny_model
from helpers.pipelines import tiny_pipeline

from d_emo import (
    DEMOPipeline,
    DEMOTransformer2DModel,
    DiTBaselineTransformer2DModel,
    JiTTransformer2DModel,
    LightningDiTTransformer2DModel,
)
from d_emo.models.checks import UntouchedStatisticsWarning

FAMILIES = {"D-EMOv2": DEMOTransformer2DModel, "DiT": DiTBaselineTransformer2DModel,
            "LightningDiT": LightningDiTTransformer2DModel, "JiT": JiTTransformer2DModel}  # fmt: skip
X, T, LABELS = torch.randn(2, 4, 16, 16), torch.tensor([3, 500]), torch.tensor([0, 9])


@pytest.mark.parametrize("family", ["D-EMOv2", "DiT"])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X[0], T, LABELS), r"hidden_states are \(4, 16, 16\).*hidden_states\[None\]"),
        ((X[None], T, LABELS), r"hidden_states are \(1, 2, 4, 16, 16\)"),
        ((X.numpy(), T, LABELS), "hidden_states are"),
        ((None, T, LABELS), "hidden_states are NoneType"),
        ((X.long(), T, LABELS), "hidden_states are torch.int64"),
        ((X.permute(0, 2, 3, 1), T, LABELS), r"the input has 16 channels, the model takes 4 .*permute"),
        ((X[:, :, :15], T, LABELS), "height=15 is not a positive multiple of patch_size=2; use 14"),
        ((X, torch.tensor([1, 2, 3]), LABELS), r"timestep is of shape \(3,\); pass one number"),
        ((X, T[:, None], LABELS), r"timestep is of shape \(2, 1\)"),
        ((X, [1, 2], LABELS), "timestep is a list"),
        ((X, None, LABELS), "timestep is a NoneType"),
        ((X, T, torch.tensor([0, 11])), "class_labels has 11; the model's classes are 0 to 9, and 10 is no class"),
        ((X, T, torch.tensor([-1, 0])), "class_labels has -1"),
        ((X, T, LABELS.float()), r"class_labels is torch.float32.*labels.long\(\)"),
        ((X, T, LABELS.bool()), "class_labels is torch.bool"),
        ((X, T, LABELS[:, None]), r"class_labels has the shape \(2, 1\)"),
        ((X, T, torch.nn.functional.one_hot(LABELS, 10)), r"class_labels has the shape \(2, 10\)"),
        ((X, T, [0, 1]), "class_labels is a list"),
        ((X, T, 1), "class_labels is a int"),
        ((X, T), "class_labels is missing and the model has 10 classes"),
    ],
)
def test_inputs_that_cannot_be_worked_on_are_named(family, inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(family)(*inputs)


def test_labels_and_times_may_be_one_for_all_and_of_either_integer():
    model = tiny_model()
    expected = model(X, torch.tensor([7, 7]), torch.tensor([3, 3])).sample
    for time, label in ((7, torch.tensor(3)), (7.0, torch.tensor([3])), (torch.tensor([7]), LABELS.int() * 0 + 3)):
        torch.testing.assert_close(model(X, time, label).sample, expected)


def test_a_whole_model_is_compiled_and_vectorised_as_before():
    """The look at the labels' values must not be in the way of transforms."""
    model = tiny_model(num_layers=1)
    graph = torch.export.export(model, (X, T, LABELS, False))
    torch.testing.assert_close(graph.module()(X, T, LABELS, False)[0], model(X, T, LABELS).sample, atol=1e-5, rtol=1e-4)
    dit = tiny_model("DiT", num_layers=1)
    one_by_one = torch.func.vmap(lambda x, t, y: dit(x[None], t[None], y[None], return_dict=False)[0][0])
    torch.testing.assert_close(one_by_one(X, T, LABELS), dit(X, T, LABELS).sample, atol=1e-4, rtol=1e-4)


def edited(folder, **changes):
    """A saved model whose configuration says something else."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("layers", "message"), [(1, "num_layers=1, the weights have 2 blocks"), (3, "missing in the file: blocks.2")]
)
def test_half_a_network_is_no_model(family, layers, message, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    FAMILIES[family].from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"config.json and weights are of different models.*{message}"):
        FAMILIES[family].from_pretrained(edited(tmp_path, num_layers=layers))


def test_a_pipeline_with_half_a_network_does_not_load(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    edited(tmp_path / "transformer", num_layers=1)
    with pytest.raises(ValueError, match="different models"):
        DEMOPipeline.from_pretrained(tmp_path)


def test_other_networks_folders_are_refused_by_name(tmp_path):
    other = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8
    )
    other.save_pretrained(tmp_path / "diffusers")
    with pytest.raises(ValueError, match=r"is of a DiTTransformer2DModel.*DiTBaselineTransformer2DModel.*converts"):
        DEMOTransformer2DModel.from_pretrained(tmp_path / "diffusers")
    tiny_model("DiT").save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match=r"load it with DiTBaselineTransformer2DModel.from_pretrained"):
        DEMOTransformer2DModel.from_pretrained(tmp_path / "dit")


def test_a_subclass_loads_what_its_parent_saved_and_information_is_given(tmp_path):
    class Mine(DEMOTransformer2DModel):
        pass

    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded, information = Mine.from_pretrained(tmp_path, output_loading_info=True)
    assert information["missing_keys"] == [] and type(loaded) is Mine
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_untouched_statistics_are_said_of_trained_weights_only(tmp_path):
    from d_emo import create_model

    tiny = {"sample_size": 8, "hidden_size": 16, "num_layers": 2, "num_classes": 3}
    fresh = create_model("D-EMOv2-N-4", **tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntouchedStatisticsWarning)
        for model, name in ((fresh, "fresh"), (tiny_model(), "trained"), (tiny_model("DiT"), "dit")):
            model.save_pretrained(tmp_path / name)
            type(model).from_pretrained(tmp_path / name)
    fresh.proj_out.weight.data.normal_()
    with pytest.warns(UntouchedStatisticsWarning, match="2 of 2 BatchNorm layers"):
        fresh.save_pretrained(tmp_path / "forgotten")
    with pytest.warns(UntouchedStatisticsWarning, match="forgotten was saved"):
        DEMOTransformer2DModel.from_pretrained(tmp_path / "forgotten")


def test_a_pipeline_hands_on_how_the_model_is_to_be_saved(tmp_path):
    """Diffusers looks at the signature of a part's `save_pretrained` for what it takes."""
    tiny_pipeline().save_pretrained(tmp_path, variant="fp16")
    assert [path.name for path in (tmp_path / "transformer").glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    DEMOPipeline.from_pretrained(tmp_path, variant="fp16")
    tiny_pipeline().save_pretrained(tmp_path / "cut", max_shard_size="50KB")
    assert (tmp_path / "cut" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    DEMOPipeline.from_pretrained(tmp_path / "cut")
