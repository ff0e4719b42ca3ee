"""EMOv2 under other people's heads: forward, backward, save and load."""

import pytest
import segmentation_models_pytorch as smp
import torch
from helpers.models import randomize
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    SegformerConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

import d_emo.timm_models  # noqa: F401
from d_emo import EMOv2Backbone, EMOv2Config, create_classifier

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def backbone_config(**options):
    return EMOv2Config.of("EMOv2-1M", **options)


def assert_learns(model, loss):
    """A finite loss, whose gradient reaches the backbone's first layer."""
    assert torch.isfinite(loss)
    loss.backward()
    stem = [
        parameter for name, parameter in model.named_parameters() if "stem" in name and name.endswith("conv.weight")
    ]
    assert len(stem) == 1 and stem[0].grad.abs().sum() > 0


@pytest.mark.parametrize("decoder", [smp.Unet, smp.FPN, smp.PSPNet, smp.DeepLabV3, smp.DeepLabV3Plus, smp.Segformer])
def test_segmentation_models_pytorch_takes_it_by_timms_name(tmp_path, decoder):
    torch.manual_seed(0)
    model = decoder("tu-emov2_1m", encoder_weights=None, classes=5)
    pixels = torch.randn(2, 3, 64, 64)
    assert_learns(model, model.train()(pixels).square().mean())
    model.eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = decoder("tu-emov2_1m", encoder_weights=None, classes=5).eval()
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    with torch.no_grad():
        answer = model(pixels)
        assert answer.shape == (2, 5, 64, 64) and torch.equal(answer, again(pixels))


def test_uper_net(tmp_path):
    config = UperNetConfig(
        backbone_config=backbone_config(out_features=STAGES), num_labels=5, hidden_size=32, auxiliary_in_channels=80
    )
    model = UperNetForSemanticSegmentation(config)
    pixels = torch.randn(2, 3, 64, 64)
    output = model(pixels, labels=torch.zeros(2, 64, 64, dtype=torch.long))
    assert output.logits.shape == (2, 5, 64, 64)
    assert_learns(model, output.loss)
    assert_restored(model, tmp_path, pixels)


def test_detr_freezes_the_norms_and_sees_the_same_features(tmp_path):
    options = {"num_labels": 3, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 1, "d_model": 32,
               "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
               "decoder_ffn_dim": 32}  # fmt: skip
    config = DetrConfig(backbone_config=backbone_config(out_features=["stage4"]), **options)
    model = DetrForObjectDetection(config)
    plain = randomize(EMOv2Backbone(config.backbone_config))
    inner = model.model.backbone.model
    inner.load_state_dict(plain.state_dict(), strict=False)  # frozen norms count no batches
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = plain.eval()(pixels).feature_maps[0]
        # Another formula for the same norm; logits of random weights are of order 1.
        torch.testing.assert_close(inner.eval()(pixels).feature_maps[0], expected, atol=1e-4, rtol=1e-4)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    output = model.train()(pixels, labels=labels)
    assert output.logits.shape == (1, 5, 4)
    assert_learns(model, output.loss)
    assert_restored(model, tmp_path, pixels)


def assert_restored(model, folder, pixels):
    """A saved and loaded model gives the same logits."""
    model.eval().save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, again(pixels).logits)


def test_segformers_head():
    backbone = EMOv2Backbone(backbone_config(out_features=STAGES))
    head = SegformerDecodeHead(SegformerConfig(hidden_sizes=backbone.channels, decoder_hidden_size=32, num_labels=5))
    logits = head(backbone(torch.randn(2, 3, 64, 64)).feature_maps)
    assert logits.shape == (2, 5, 16, 16)
    assert_learns(backbone, logits.square().mean())


@pytest.mark.parametrize(
    ("output_stride", "sides", "dilations"),
    [
        (32, [32, 16, 8, 4, 2], [1, 1, 1, 1]),
        (16, [32, 16, 8, 4, 4], [1, 1, 1, 2]),
        (8, [32, 16, 8, 8, 8], [1, 1, 2, 4]),
    ],
)
def test_the_output_stride_keeps_the_grid_and_dilates(output_stride, sides, dilations):
    model = create_classifier("EMOv2-1M", image_size=64, output_stride=output_stride)
    maps = model.forward_stages(torch.randn(1, 3, 64, 64))
    assert [stage.shape[-1] for stage in maps] == sides
    assert [stage.blocks[1].i2rmb.conv.dilation[0] for stage in model.stages] == dilations
    published = create_classifier("EMOv2-1M", image_size=64)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in published.state_dict().items()
    }


def test_an_unknown_output_stride_is_refused():
    with pytest.raises(ValueError, match="output_stride=4 is not one of 8, 16, 32"):
        create_classifier("EMOv2-1M", output_stride=4)
