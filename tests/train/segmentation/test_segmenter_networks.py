"""The network that a segmentation run begins with: fresh, on a classifier, of a published file, a trained segmenter."""

import pytest
import torch
from helpers.made import write_classifier
from helpers.segmenters import segmenter

from d_emo import EMOv2ForImageClassification, create_segmenter
from d_emo.classification.checkpoint_files import read_classifier
from d_emo.classification.variants import create_classifier
from d_emo.train.segmentation.config import SegmenterOptions
from d_emo.train.segmentation.networks import build_network

NAMES = {0: "ground", 1: "vessel"}
NARROW = '{"head_channels": 8, "auxiliary_channels": 8}'


def build(**options):
    return build_network(SegmenterOptions(**options), NAMES)


def same(first, second, prefix=""):
    a, b = first.state_dict(), second.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a if name.startswith(prefix))


@pytest.mark.parametrize("head", ["deeplabv3", "pspnet", "segformer", "semantic_fpn"])
def test_every_head_on_a_backbone(head):
    model = build(model="EMOv2-1M", head=head, model_config='{"drop_path": 0.0, "loss_over_ignored": true}')
    assert model.config.head == head and model.config.id2label == NAMES and model.config.loss_over_ignored
    assert model.config.backbone_config.drop_path == 0 and model.config.backbone_config.window_size == 10


@pytest.mark.parametrize(("name", "block"), [("U-EMOv2-5M", "i2rmb"), ("UNet-S5-D16", "conv")])
def test_whole_networks(name, block):
    model = build(model=name, model_config='{"base_channels": 8, "head_dim": 8}')
    assert model.config.block == block and model.config.num_labels == 2


def test_a_classifiers_folder_gives_the_stages(tmp_path):
    folder = write_classifier(tmp_path / "classifier")
    classifier = EMOv2ForImageClassification.from_pretrained(folder)
    model = build(init_from=str(folder), head="segformer", model_config=NARROW)
    state, stages = classifier.emov2.state_dict(), model.backbone.emov2.state_dict()
    assert len(stages) > 50 and all(torch.equal(stages[name], state[name]) for name in stages)
    assert model.config.head == "segformer" and model.config.id2label == NAMES


def test_a_published_file_gives_the_stages(tmp_path):
    torch.manual_seed(0)
    classifier = create_classifier("EMOv2-1M", num_classes=3)
    torch.save(classifier.state_dict(), tmp_path / "EMOv2_1M.pth")
    assert read_classifier(tmp_path / "EMOv2_1M.pth")[:2] == ("EMOv2-1M", 3)
    model = build(init_from=str(tmp_path / "EMOv2_1M.pth"), head="segformer")
    stages = model.backbone.emov2.state_dict()
    assert all(torch.equal(stages[name], classifier.state_dict()[name]) for name in stages) and len(stages) > 100
    assert model.config.head_channels == 180  # of the size that the tensors tell
    with pytest.raises(ValueError, match="do not fit --model-config"):
        build(init_from=str(tmp_path / "EMOv2_1M.pth"), model_config='{"depths": [1, 1, 1, 1]}')


def test_a_trained_segmenter_keeps_all_where_the_classes_are_the_same(tmp_path):
    former = segmenter(id2label=NAMES)
    former.save_pretrained(tmp_path)
    assert same(build(init_from=str(tmp_path)), former)


@pytest.mark.parametrize("names", [{0: "a", 1: "b", 2: "c"}, {0: "vessel", 1: "ground"}])
def test_its_last_layers_are_new_where_the_classes_differ(names, tmp_path):
    former = segmenter(id2label=names)
    former.save_pretrained(tmp_path)
    model = build(init_from=str(tmp_path))
    assert model.config.id2label == NAMES and model.config.label2id == {"ground": 0, "vessel": 1}
    for part in (model.decode_head, model.auxiliary_head):
        assert part.classifier.weight.shape[0] == 2 and part.classifier.weight.std() < 0.02
        assert (part.classifier.bias == 0).all()
    assert same(model.backbone, former.backbone) and same(model.decode_head.bottleneck, former.decode_head.bottleneck)
    model.save_pretrained(tmp_path / "new")
    assert same(build(init_from=str(tmp_path / "new")), model)


def test_what_does_not_go_together_is_refused(tmp_path):
    folder, trained = write_classifier(tmp_path / "classifier"), tmp_path / "segmenter"
    segmenter().save_pretrained(trained)
    (tmp_path / "bad.pth").write_bytes(b"no tensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    unet = tmp_path / "unet"
    create_segmenter("UNet-S5-D16", num_classes=2, base_channels=8).save_pretrained(unet)
    for options, message in (
        ({"model": "EMOv2-5N"}, "--model EMOv2-5N: .*did you mean|--model EMOv2-5N"),
        ({"model": "U-EMOv2-5M", "head": "segformer"}, "--model U-EMOv2-5M: .*leave it out"),
        ({"model_config": '{"depht": [1]}'}, "depht"),
        ({"init_from": "no_such_folder"}, "--init-from no_such_folder: "),
        ({"init_from": "EMOv2-5M"}, "--init-from EMOv2-5M: that is a size"),
        ({"init_from": str(tmp_path / "none.pth")}, "there is no such file"),
        ({"init_from": str(tmp_path / "bad.pth")}, "not a file of tensors"),
        ({"init_from": str(tmp_path / "other.pth")}, "unknown tensor a"),
        ({"init_from": str(folder), "model": "U-EMOv2-5M"}, "has nothing of a classifier"),
        ({"init_from": str(folder), "model_config": '{"widths": [8, 8, 8, 8]}'}, "does not fit the weights"),
        ({"init_from": str(trained), "head": "pspnet"}, "its head is deeplabv3; leave out --head pspnet"),
        ({"init_from": str(unet), "head": "pspnet"}, "its head is its own; leave out --head pspnet"),
        ({"init_from": str(trained), "model_config": '{"dropout": 0}'}, "leave out --model-config"),
        ({"init_from": str(tmp_path)}, f"--init-from {tmp_path}: "),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            build(**options)
        assert "\n" not in str(refused.value), options
