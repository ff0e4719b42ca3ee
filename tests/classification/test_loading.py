"""Classifiers' folders: whole ones load, half ones and others' are refused, and what is new is named."""

import json
import warnings

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.models import randomize, tiny_model
from helpers.pipelines import tiny_pipeline
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from d_emo import EMOv2Backbone, EMOv2Config, EMOv2ForImageClassification
from d_emo.classification.transformers_models import EMOv2PreTrainedModel

TINY = {"depths": (1, 1, 2, 1), "widths": (8, 8, 16, 16), "head_dims": (8, 8, 8, 8)}
WEIGHTS = "model.safetensors"
KINDS = (EMOv2ForImageClassification, AutoModelForImageClassification)


def classifier(num_labels=2):
    return randomize(EMOv2ForImageClassification(EMOv2Config(**TINY, num_labels=num_labels))).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_folder_loads_without_a_word(kind, tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, information = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not information["missing_keys"]
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    assert type(kind.from_pretrained(tmp_path)) is EMOv2ForImageClassification


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("emov2.head.weight"), "missing in the file: emov2.head.weight"),
        (lambda state: state.pop("emov2.stem.conv.weight"), "missing in the file: emov2.stem.conv.weight"),
        (lambda state: state.pop("emov2.stem.conv_norm.running_mean"), "missing in the file: emov2.stem.conv_norm"),
        (lambda state: state.update({"emov2.more": torch.ones(1)}), "not in the model: emov2.more"),
        (lambda state: state.update({"emov2.head.bias": torch.ones(5)}), r"bias \(5,\), not \(2,\).*other classes"),
        (lambda state: state.update({"emov2.stem.conv.bias": torch.ones(9)}), r"stem.conv.bias \(9,\), not \(4,\)"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_an_error(kind, change, message, tmp_path):
    classifier().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    change(state)
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message) as refusal:
        kind.from_pretrained(tmp_path)
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith(str(tmp_path))


@pytest.mark.parametrize("changes", [{"depths": [1, 1, 3, 1]}, {"depths": [1, 1, 1, 1]}, {"widths": [8, 8, 16, 24]}])
def test_a_configuration_of_another_network_is_an_error(changes, tmp_path):
    classifier().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=r"different models|other shapes"):
        EMOv2ForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_other_classes_get_a_new_head_that_is_named(kind, tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ignore_mismatched_sizes=True, which makes a new head"):
        kind.from_pretrained(tmp_path, num_labels=7)
    with pytest.warns(UserWarning, match=r"emov2.head.bias, emov2.head.weight are newly initialised"):
        other = kind.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert other.emov2.head.weight.shape == (7, 16) and other.emov2.head.weight.abs().max() > 0
    torch.testing.assert_close(other.emov2.stages.state_dict(), model.emov2.stages.state_dict())


def test_features_become_a_classifier_and_the_other_way_round(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path / "classifier")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = EMOv2Backbone.from_pretrained(tmp_path / "classifier")
    features.save_pretrained(tmp_path / "features")
    with pytest.warns(UserWarning, match=r"emov2.head.bias, .*emov2.norm.weight are newly initialised"):
        again = EMOv2ForImageClassification.from_pretrained(tmp_path / "features", num_labels=3)
    torch.testing.assert_close(again.emov2.stages.state_dict(), model.emov2.stages.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft_bring_their_base(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra lora")
    classifier().save_pretrained(tmp_path / "base")
    base = EMOv2ForImageClassification.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["proj_out"]))
    randomize(adapted)
    adapted.save_pretrained(tmp_path / "adapters")
    again = kind.from_pretrained(tmp_path / "adapters")
    lora = {name: tensor for name, tensor in again.state_dict().items() if "lora_B" in name}
    assert lora and all(tensor.abs().max() > 0 for tensor in lora.values())


class Projected(EMOv2PreTrainedModel):
    """A class of a user's own on the network, as transformers' are made."""

    def __init__(self, config):
        super().__init__(config)
        self.emov2 = config.build(0)
        self.projection = torch.nn.Linear(config.widths[-1], 5)
        self.post_init()


def test_a_class_of_ones_own_begins_with_a_classifiers_weights(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path / "classifier")
    with pytest.warns(UserWarning, match=r"projection\.bias, projection\.weight are newly initialised"):
        derived = Projected.from_pretrained(tmp_path / "classifier")
    torch.testing.assert_close(derived.emov2.norm.state_dict(), model.emov2.norm.state_dict())
    derived.save_pretrained(tmp_path / "derived")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Projected.from_pretrained(tmp_path / "derived")
    torch.testing.assert_close(again.state_dict(), derived.state_dict())
    state = load_file(tmp_path / "derived" / WEIGHTS)
    state.pop("projection.weight")
    save_file(state, tmp_path / "derived" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing in the file: projection\.weight"):  # of its own folder
        Projected.from_pretrained(tmp_path / "derived")
    with pytest.raises(ValueError, match=r"not in the model: projection\.bias"):
        EMOv2ForImageClassification.from_pretrained(tmp_path / "derived", num_labels=2)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda folder: tiny_model().save_pretrained(folder), "is of a DEMOTransformer2DModel, not of a EMOv2For"),
        (lambda folder: tiny_pipeline().save_pretrained(folder), r"holds a pipeline \(DEMOPipeline\), not a EMOv2For"),
        (lambda folder: AutoencoderKL(block_out_channels=(32,)).save_pretrained(folder), "is of a AutoencoderKL"),
        (lambda folder: vit().save_pretrained(folder), "is of a ViTForImageClassification of transformers"),
        (lambda folder: folder.mkdir(exist_ok=True), "holds nothing that a library saved"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    ],
)  # fmt: skip
def test_other_folders_are_refused_by_name(save, message, tmp_path):
    save(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        EMOv2ForImageClassification.from_pretrained(tmp_path)
    assert "\n" not in str(refusal.value)


def vit():
    return ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    )
