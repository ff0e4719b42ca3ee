"""Segmenters in transformers: grids, gradients, folders, pipelines, Trainer, and what is refused."""

import copy
import json
import sys
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from helpers.segmenters import HEADS, NARROW, STRIDES, TINY, labels, pixels, segmenter
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    SegformerImageProcessor,
    SegformerImageProcessorPil,
    Trainer,
    TrainingArguments,
    pipeline,
)

from d_emo import EMOv2Config, EMOv2ForImageClassification, EMOv2ForSemanticSegmentation, EMOv2SegmentationConfig
from d_emo.segmentation.transformers_models import make_segmentation_processor

WEIGHTS = "model.safetensors"


def picture(width=90, height=70):
    return PIL.Image.fromarray(np.random.RandomState(0).randint(0, 255, (height, width, 3), dtype=np.uint8))


# ---- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (200, 264), (33, 47), (5, 300), (1, 1)])
def test_logits_are_on_the_heads_grid_at_every_size(head, height, width):
    model, stride = segmenter(head), STRIDES[head]
    with torch.no_grad():
        logits = model(pixels(1, height, width)).logits
    assert logits.shape == (1, 3, -(-height // stride), -(-width // stride)) and logits.isfinite().all()


@pytest.mark.parametrize("head", HEADS)
def test_logits_depend_on_the_picture_and_images_of_a_batch_do_not_mix(head):
    model = segmenter(head)
    with torch.no_grad():
        both = model(pixels(2)).logits
        alone = torch.cat([model(image[None]).logits for image in pixels(2)])
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4)
    assert (both[0] - both[1]).abs().max() > 0.01


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_channels_train(channels, tmp_path):
    model = segmenter("pspnet", {"num_channels": channels}).train()
    assert model(pixels(channels=channels), labels=labels()).loss.isfinite()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()  # none in transformers takes such pictures
    assert AutoModelForSemanticSegmentation.from_pretrained(tmp_path).config.num_channels == channels


def test_other_channels_are_normalised_by_the_average_of_the_colours():
    config = EMOv2SegmentationConfig(EMOv2Config(**{**TINY, "num_channels": 5}))
    assert config.image_mean == pytest.approx([0.449] * 5) and config.image_std == pytest.approx([0.226] * 5)


def test_hidden_states_are_the_stem_and_the_stages_and_a_tuple_comes_where_it_is_asked_for():
    model = segmenter()
    with torch.no_grad():
        output = model(pixels(), labels=labels(), output_hidden_states=True)
        plain = model(pixels(), labels=labels(), return_dict=False)
        assert model(pixels()).hidden_states is None and model(pixels()).loss is None
    assert [tuple(stage.shape[1:]) for stage in output.hidden_states] == [
        (4, 32, 32), (8, 16, 16), (8, 8, 8), (16, 4, 4), (16, 2, 2)
    ]  # fmt: skip
    torch.testing.assert_close(plain, (output.loss, output.logits))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_learns(head):
    model = segmenter(head, {"drop_path": 0.0}).train()
    model(pixels(4), labels=labels(4)).loss.backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not still


@pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")
def test_checkpointed_gradients_and_statistics_are_the_plain_ones():
    plain = segmenter("pspnet", {"drop_path": 0.0}, dropout=0.0).train()
    again = copy.deepcopy(plain)
    again.gradient_checkpointing_enable()
    assert all(stage.gradient_checkpointing for stage in again.backbone.emov2.stages)
    for model in (plain, again):
        model(pixels(), labels=labels()).loss.backward()
    torch.testing.assert_close(
        [parameter.grad for parameter in again.parameters()], [parameter.grad for parameter in plain.parameters()],
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    torch.testing.assert_close(again.state_dict(), plain.state_dict())


def test_it_learns_two_pictures_by_heart():
    """Halves of the pictures told by their brightness: a few steps get most pixels right, where a guess gets half."""
    torch.manual_seed(0)
    config = EMOv2SegmentationConfig(EMOv2Config(**TINY), "segformer", num_labels=2, **NARROW)
    model = EMOv2ForSemanticSegmentation(config).train()
    images, ids = pixels(4) * 0.2, torch.zeros(4, 64, 64, dtype=torch.long)
    for number in range(4):
        part = slice(0, 32) if number % 2 else slice(32, 64)
        ids[number, :, part] = 1
        images[number, :, :, part] += 1.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(images, labels=ids).loss
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits = F.interpolate(model(images).logits, size=(64, 64), mode="bilinear")
    assert loss < 0.4 and (logits.argmax(1) == ids).float().mean() > 0.9


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_folders_hold_all_that_a_pipeline_needs(head, tmp_path):
    model = segmenter(head, id2label=["sky", "sea", "sand"])
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", WEIGHTS, "preprocessor_config.json"}
    found = pipeline("image-segmentation", model=str(tmp_path))(picture())
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    given = processor(picture(), return_tensors="pt")["pixel_values"]
    assert given.shape == (1, 3, 512, 658)
    with torch.no_grad():
        (expected,) = processor.post_process_semantic_segmentation(model(given), target_sizes=[(70, 90)])
    assert expected.shape == (70, 90)
    masks = {entry["label"]: np.array(entry["mask"]) for entry in found}
    assert sorted(masks) == sorted(model.config.id2label[number] for number in expected.unique().tolist())
    for number, name in model.config.id2label.items():
        if name in masks:
            assert masks[name].shape == (70, 90) and ((masks[name] > 0) == (expected == number).numpy()).all()


@pytest.mark.parametrize("head", HEADS)
def test_a_whole_folder_loads_without_a_word(head, tmp_path):
    model = segmenter(head, dropout=0.2, auxiliary_weight=0.3)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), EMOv2SegmentationConfig)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, information = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is EMOv2ForSemanticSegmentation and not information["missing_keys"]
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    assert (loaded.config.dropout, loaded.config.auxiliary_weight, loaded.config.head) == (0.2, 0.3, head)
    assert loaded.backbone.config.to_dict()["window_size"] == 4
    assert type(AutoModelForSemanticSegmentation.from_config(model.config)) is EMOv2ForSemanticSegmentation
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels()).logits, model(pixels()).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("decode_head.classifier.bias"), "missing in the file: decode_head.classifier.bias"),
        (lambda state: state.pop("backbone.emov2.stem.conv.weight"), "missing in the file: backbone.emov2.stem.conv"),
        (lambda state: state.update({"decode_head.more": torch.ones(1)}), "not in the model: decode_head.more"),
        (lambda state: state.update({"auxiliary_head.unit.bn.bias": torch.ones(9)}), r"bias \(9,\), not \(8,\)"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_an_error(change, message, tmp_path):
    segmenter().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    change(state)
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path)


def test_other_classes_get_new_classifiers_that_are_named(tmp_path):
    model = segmenter()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ignore_mismatched_sizes=True, which makes a new head"):
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path, num_labels=7)
    with pytest.warns(UserWarning, match=r"auxiliary_head.classifier.bias, .*decode_head.classifier.weight are newly"):
        other = AutoModelForSemanticSegmentation.from_pretrained(
            tmp_path, id2label=["a", "b"], ignore_mismatched_sizes=True
        )
    assert other.decode_head.classifier.out_channels == 2 and other.config.label2id == {"a": 0, "b": 1}
    assert 0 < other.decode_head.classifier.weight.abs().max() < 0.1
    for part in ("backbone", "decode_head.bottleneck", "auxiliary_head.unit"):
        torch.testing.assert_close(other.get_submodule(part).state_dict(), model.get_submodule(part).state_dict())


def test_the_auxiliary_head_may_be_left_out_of_what_is_loaded(tmp_path):
    model = segmenter()
    model.save_pretrained(tmp_path)
    small = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, auxiliary=False)
    assert small.auxiliary_head is None
    with torch.no_grad():
        torch.testing.assert_close(small(pixels()).logits, model(pixels()).logits)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"missing in the file: auxiliary_head"):
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "small", auxiliary=True)


def test_the_pipeline_takes_greys_and_slivers(tmp_path):
    segmenter("segformer").save_pretrained(tmp_path)
    task = pipeline("image-segmentation", model=str(tmp_path))
    for given in (picture().convert("L"), picture().convert("RGBA"), picture(1, 1), picture(900, 2)):
        assert task(given)[0]["mask"].size == given.size


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_backbones_of_other_depths_are_taken(stages):
    backbone = {"depths": [1] * stages, "attending_stages": [], "norms": ["batch"] * stages, "widths": [8] * stages,
                "activations": ["silu"] * stages, "head_dims": [8] * stages, "kernel_sizes": [3] * stages,
                "expansions": [2.0] * stages}  # fmt: skip
    for head in ("segformer", "semantic_fpn"):
        assert segmenter(head, backbone)(pixels()).logits.shape == (2, 3, 16, 16)
    if stages == 1:
        with pytest.raises(ValueError, match=r"auxiliary=True needs a backbone of two stages or more"):
            segmenter("pspnet", backbone)
    assert segmenter("pspnet", backbone, auxiliary=False)(pixels()).logits.shape[-1] == 64 // 2 ** (1 + min(stages, 4))


def test_a_classifiers_folder_is_for_create_segmenter(tmp_path):
    EMOv2ForImageClassification(EMOv2Config(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no decode head; put one on it: create_segmenter\('"):
        EMOv2ForSemanticSegmentation.from_pretrained(tmp_path)
    segmenter().save_pretrained(tmp_path / "segmenter")
    with pytest.raises(ValueError, match="is of a EMOv2ForSemanticSegmentation of transformers"):
        EMOv2ForImageClassification.from_pretrained(tmp_path / "segmenter")


def test_a_processor_that_is_there_is_kept_and_a_file_is_no_folder(tmp_path):
    SegformerImageProcessorPil(size={"height": 96, "width": 96}).save_pretrained(tmp_path)
    segmenter().save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).size["height"] == 96
    with pytest.raises(ValueError, match=r"save_directory='.*config\.json' is a file; pass a folder"):
        segmenter().save_pretrained(tmp_path / "config.json")


@pytest.mark.parametrize(("head", "dtype"), [*((head, torch.bfloat16) for head in HEADS), ("deeplabv3", torch.float16)])
def test_folders_load_in_half_precision(head, dtype, tmp_path):
    model = segmenter(head)
    model.save_pretrained(tmp_path)
    half = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        output, expected = half(pixels().to(dtype), labels=labels()), model(pixels(), labels=labels())
        assert half.dtype == output.logits.dtype == dtype and output.loss.dtype == torch.float32
        assert (output.logits.float() - expected.logits).std() < 0.07 * expected.logits.std()
        with torch.autocast("cpu", dtype):
            assert model(pixels(), labels=labels()).loss.isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "fcn"}, r"EMOv2SegmentationConfig: head='fcn' is not one of deeplabv3, pspnet, segformer, semantic"),
        ({"num_labels": 1}, r"num_labels=1 is not a whole number from 2"),
        ({"id2label": {"0": "a", "2": "b"}}, r"id2label has the numbers 0, 2; pass a list of names"),
        ({"backbone_config": {"model_type": "resnet"}}, r"backbone_config is .*; pass an EMOv2Config"),
        ({"backbone_config": 3}, r"backbone_config is 3; pass an EMOv2Config"),
        ({"backbone_config": {"depths": [1, 1]}}, r"EMOv2Config: widths=.* has 4 entries, depths has 2"),
        ({"dropout": -1}, r"dropout=-1 is not a number from 0"),
        ({"loss_over_ignored": "yes"}, r"loss_over_ignored='yes' is not True or False"),
        ({"num_channels": 1}, r"num_channels=1 is for the backbone, which has 3; pass it in backbone_config"),
        ({"window_size": 7}, r"window_size=7 is for the backbone, which has (10|4)"),
    ],
)
def test_a_configuration_refuses_what_is_none(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        EMOv2SegmentationConfig(**changes)
    segmenter().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path)


# ---- processor, Trainer, devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(683, 512, (512, 683)), (500, 1000, (1024, 512)), (3000, 300, (205, 2048))]
)
def test_pictures_get_the_published_evaluations_size(width, height, expected):
    """Short side 512, long side at most 2048, as mmcv's rescaling to (2048, 512) makes it."""
    plain = make_segmentation_processor()
    for processor in (plain, SegformerImageProcessor.from_dict(plain.to_dict())):
        given = processor(picture(width, height), return_tensors="pt")["pixel_values"]
        assert tuple(given.shape[2:]) == expected


def test_labels_of_ade20k_are_shifted():
    processor = make_segmentation_processor()
    ids = PIL.Image.fromarray(np.array([[0, 1], [150, 2]], dtype=np.uint8).repeat(256, 0).repeat(256, 1))
    given = processor(picture(512, 512), segmentation_maps=ids, do_reduce_labels=True, return_tensors="pt")
    assert given["labels"][0][::256, ::256].tolist() == [[255, 0], [149, 1]]


class Pictures(torch.utils.data.Dataset):
    """Six pictures with labels."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"pixel_values": pixels(1, seed=index)[0], "labels": labels(1, seed=index)[0]}


def test_transformers_trainer_takes_it_and_accumulates_means(tmp_path):
    """A model that swallowed the Trainer's `num_items_in_batch` would get a sum of gradients instead."""
    model = segmenter("segformer", {"drop_path": 0.0}, dropout=0.0)
    expected, order = copy.deepcopy(model).train(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: order.append(kwargs), with_kwargs=True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=1,
        learning_rate=0.1, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", use_cpu=True, seed=0,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    run = Trainer(model=model, args=arguments, train_dataset=Pictures(), eval_dataset=Pictures())
    run.train()
    for given in order:
        (expected(pixel_values=given["pixel_values"], labels=given["labels"]).loss / 2).backward()
    weight = expected.decode_head.classifier.weight
    torch.testing.assert_close(model.decode_head.classifier.weight, weight - 0.1 * weight.grad, atol=1e-6, rtol=1e-5)
    assert run.predict(Pictures()).predictions.shape == (6, 3, 16, 16)
    assert (tmp_path / "checkpoint-1" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("head", HEADS)
def test_parts_on_several_devices_give_the_same(head, tmp_path):
    model = segmenter(head)
    model.save_pretrained(tmp_path)
    parts = {name: "cpu" for name, _ in model.named_children()}
    split = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, device_map={**parts, "decode_head": "disk"},
                                                             offload_folder=tmp_path / "off")  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(split(pixels()).logits, model(pixels()).logits, atol=1e-4, rtol=1e-4)


def test_a_fresh_models_layer_scale_and_norms_are_the_networks():
    model = EMOv2ForSemanticSegmentation(
        EMOv2SegmentationConfig(EMOv2Config(**{**TINY, "layer_scale": 1e-6}), **NARROW)
    )
    scales = [tensor for name, tensor in model.named_parameters() if name.endswith("layer_scale")]
    assert scales and all((scale == 1e-6).all() for scale in scales)
    state = model.state_dict()
    assert all(tensor.eq(1).all() for name, tensor in state.items() if name.endswith(("norm.weight", "bn.weight")))


def test_a_fresh_feature_pyramid_starts_as_mmsegmentations():
    """Xavier's uniform distribution, biases at 0."""
    torch.manual_seed(0)
    config = EMOv2SegmentationConfig(EMOv2Config(**TINY), "semantic_fpn", pyramid_channels=64)
    neck = EMOv2ForSemanticSegmentation(config).neck
    for layer in (neck.inner_blocks[3][0], neck.layer_blocks[0][0]):
        bound = (6 / (layer.weight[0].numel() + layer.weight[:, 0].numel())) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()


def test_a_feature_pyramid_says_that_it_needs_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    with pytest.raises(ImportError, match=r"head='semantic_fpn' needs torchvision; pip install 'd-emo\[eval\]'"):
        segmenter("semantic_fpn")
