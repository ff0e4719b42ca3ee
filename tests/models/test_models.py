"""The diffusion transformers: definition, interface, and what Diffusers offers on top."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from helpers.models import fresh_model, randomize, tiny_model

from d_emo import DEMOTransformer2DModel, create_model, list_models
from d_emo.models.flops import count_macs, count_parameters, macs_of
from d_emo.models.layers import sincos_positions

FAMILIES = ["D-EMOv2", "DiT", "LightningDiT", "JiT"]


def inputs(model, batch: int = 3, height: int = 16, width: int = 16):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, model.config.in_channels, height, width, generator=generator)
    timestep = torch.linspace(20, 900, batch)
    labels = torch.arange(batch) % (model.config.num_classes + 1)
    return latents, timestep, labels


def test_multiply_adds_of_a_product_and_of_attention_are_those_of_their_shapes():
    assert macs_of(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 3 * 5 * 7
    tokens = torch.ones(2, 3, 11, 4)  # two products of 11 x 11 x 4 a head
    assert macs_of(lambda: F.scaled_dot_product_attention(tokens, tokens, tokens)) == 2 * 3 * 2 * 11 * 11 * 4


# Published in the paper's Table XIV and recomputed from the definition; DiT-S-2 is the published DiT's own count.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("D-EMOv2-S-2", 24_596_000),
        ("D-EMOv2-B-2", 96_082_976),
        ("D-EMOv2-L-2", 334_831_648),
        ("D-EMOv2-XL-2", 492_692_000),
        ("DiT-S-2", 32_963_360),
    ],
)
def test_parameter_counts_are_the_published_ones(name, parameters):
    with torch.device("meta"):
        assert count_parameters(create_model(name)) == parameters


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("D-EMOv2-S-2", 5.413),
        ("D-EMOv2-B-2", 19.898),
        ("D-EMOv2-L-2", 69.172),
        ("D-EMOv2-XL-2", 101.367),
        ("DiT-XL-2", 118.6),
    ],
)
def test_macs_are_the_published_ones(name, gmacs):
    with torch.device("meta"):
        macs = count_macs(create_model(name)) / 1e9
    assert f"{macs:.3f}".startswith(str(gmacs))


@pytest.mark.parametrize("name", list_models())
def test_every_named_model_builds_and_takes_its_input(name):
    with torch.device("meta"):
        model = create_model(name, num_layers=1)
        images = torch.empty(2, model.config.in_channels, 32, 32)
        output = model(images, torch.empty(2), torch.zeros(2, dtype=torch.long)).sample
    assert output.shape == (2, model.out_channels, 32, 32)
    assert model.config.patch_size == int(name.rpartition("-")[2])


def test_list_models_filters_by_pattern():
    assert list_models("D-EMOv2-*-8") == [f"D-EMOv2-{size}-8" for size in ("N", "Ti", "S", "B", "L", "XL")]


@pytest.mark.parametrize(
    ("name", "hint"), [("D-EMOv2-B/2", "D-EMOv2-B-2"), ("demov2-xl-2", "D-EMOv2-XL-2"), ("resnet", "choose from")]
)
def test_unknown_model_name_raises_with_suggestions(name, hint):
    with pytest.raises(ValueError, match=f"model '{name}' is unknown.*{hint}"):
        create_model(name)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_fresh_model_outputs_zeros_and_a_random_one_does_not(family):
    fresh = fresh_model(family)
    arguments = inputs(fresh)
    assert fresh(*arguments).sample.abs().max() == 0
    assert randomize(fresh).eval()(*arguments).sample.std() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_time_and_label_change_the_output(family):
    model = tiny_model(family)
    latents, timestep, labels = inputs(model)
    base = model(latents, timestep, labels).sample
    assert (model(latents, timestep + 50, labels).sample - base).abs().max() > 1e-4
    assert (model(latents, timestep, labels + 1).sample - base).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_samples_do_not_depend_on_their_batch_in_eval_mode(family):
    model = tiny_model(family)
    latents, timestep, labels = inputs(model)
    together = model(latents, timestep, labels).sample
    alone = torch.cat([model(latents[i : i + 1], timestep[i : i + 1], labels[i : i + 1]).sample for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (20, 6), (2, 2)])
@torch.no_grad()
def test_any_size_that_the_patch_divides_is_taken(family, size):
    model = tiny_model(family)
    assert model(*inputs(model, 2, *size)).sample.shape == (2, model.out_channels, *size)


@torch.no_grad()
def test_rectangular_model_keeps_rows_and_columns_apart():
    model = tiny_model(sample_size=(8, 24))
    square = tiny_model(sample_size=24)
    square.load_state_dict({**model.state_dict(), "pos_embed": square.pos_embed})
    arguments = inputs(model, 2, 8, 24)
    torch.testing.assert_close(model(*arguments).sample, square(*arguments).sample)


def test_positions_equal_diffusers_own_to_1e_6():
    expected = get_2d_sincos_pos_embed(64, 16, base_size=16, output_type="pt")
    torch.testing.assert_close(sincos_positions(16, 16, 64).flatten(0, 1), expected.float(), atol=1e-6, rtol=0)


def test_timestep_encoding_has_dits_frequencies():
    model = tiny_model()
    frequencies = torch.tensor([math.exp(-math.log(10000) * i / 128) for i in range(128)])
    expected = torch.cat([torch.cos(321 * frequencies), torch.sin(321 * frequencies)])
    torch.testing.assert_close(model.time_proj(torch.tensor([321.0]))[0], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_dit_equals_a_plain_restatement_to_1e_5():
    model = tiny_model("DiT")
    weights = model.state_dict()
    latents, timestep, labels = inputs(model)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def modulate(x, shift, scale):
        return F.layer_norm(x, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    patches = latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(3, 64, 16)
    tokens = patches @ weights["patch_embed.weight"].flatten(1).T + weights["patch_embed.bias"]
    tokens = tokens + weights["pos_embed"].flatten(0, 1)
    angles = timestep[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = linear(torch.cat([angles.cos(), angles.sin()], 1), "time_embed.linear_1")
    cond = linear(F.silu(time), "time_embed.linear_2") + weights["label_embed.weight"][labels]
    for i in range(2):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(F.silu(cond), f"blocks.{i}.modulation").chunk(6, 1)
        query, key, value = linear(modulate(tokens, shift1, scale1), f"blocks.{i}.to_qkv").chunk(3, -1)
        heads = []
        for head in (slice(0, 16), slice(16, 32)):
            weight = (query[..., head] @ key[..., head].transpose(1, 2) / 4).softmax(-1)
            heads.append(weight @ value[..., head])
        tokens = tokens + gate1[:, None] * linear(torch.cat(heads, -1), f"blocks.{i}.to_out")
        hidden = F.gelu(linear(modulate(tokens, shift2, scale2), f"blocks.{i}.mlp_in"), approximate="tanh")
        tokens = tokens + gate2[:, None] * linear(hidden, f"blocks.{i}.mlp_out")
    shift, scale = linear(F.silu(cond), "norm_out.modulation").chunk(2, 1)
    output = linear(modulate(tokens, shift, scale), "proj_out").view(3, 8, 8, 2, 2, 8)
    expected = torch.einsum("nhwpqc->nchpwq", output).reshape(3, 8, 16, 16)
    torch.testing.assert_close(model(latents, timestep, labels).sample, expected, atol=1e-5, rtol=1e-4)


def test_label_dropout_is_not_the_models_business():
    model = tiny_model().train()
    model.requires_grad_(False)
    latents, timestep, labels = inputs(model)
    outputs = [model(latents, timestep, labels).sample for _ in range(5)]
    assert all(torch.equal(outputs[0], output) for output in outputs)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sample_size": 15}, "sample_size=15 is not a multiple of patch_size=2; use 14 x 14"),
        ({"sample_size": 1}, "sample_size=1 is not a multiple of patch_size=2; use 2 x 2"),
        ({"prediction_type": "data"}, "prediction_type='data' is not one of epsilon"),
        (
            {"prediction_type": "sample", "flow_path": "vp"},
            "prediction_type='sample' belongs to flow_path='linear', not",
        ),
        ({"prediction_type": "flow_prediction"}, "learn_sigma=True belongs to prediction_type='epsilon'"),
        ({"num_classes": -1}, "num_classes=-1 is not a whole number from 0 .*0 makes an unconditional"),
    ],
)
def test_bad_configurations_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        create_model("D-EMOv2-N-2", **overrides)


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((1, 3, 16, 16), torch.zeros(1, dtype=torch.long), "3 channels, the model takes 4"),
        (
            (1, 4, 15, 16),
            torch.zeros(1, dtype=torch.long),
            "height=15 is not a positive multiple of patch_size=2; use 14",
        ),
        ((1, 4, 16, 17), torch.zeros(1, dtype=torch.long), "width=17"),
        ((1, 4, 16, 16), None, "class_labels is missing and the model has 10 classes"),
    ],
)
def test_bad_inputs_are_refused(shape, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.zeros(shape), 10, labels)


@torch.no_grad()
def test_unconditional_model_needs_no_labels():
    model = tiny_model(num_classes=0)
    latents = torch.randn(2, 4, 16, 16)
    torch.testing.assert_close(
        model(latents, 10).sample, model(latents, torch.tensor([10, 10]), torch.zeros(2, dtype=torch.long)).sample
    )


def gradients_and_statistics(model, function) -> dict[str, torch.Tensor]:
    model = model.train()
    if function is not None:
        model.enable_gradient_checkpointing(*function)
    model(*inputs(model)).sample.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**gradients, **{name: b.clone() for name, b in model.named_buffers()}}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(family):
    expected = gradients_and_statistics(tiny_model(family), None)
    actual = gradients_and_statistics(tiny_model(family), ())
    assert expected.keys() == actual.keys()
    assert expected["blocks.0.modulation.weight"].abs().max() > 1e-6
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-7, rtol=1e-5, msg=name)


def test_plain_checkpointing_would_update_statistics_twice():
    def plain(block, *args):
        return torch.utils.checkpoint.checkpoint(block.__call__, *args, use_reentrant=False)

    expected = gradients_and_statistics(tiny_model(), None)
    actual = gradients_and_statistics(tiny_model(), (plain,))
    name = "blocks.0.i2rmb.conv_norm.running_mean"
    assert (actual[name] - expected[name]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_save_and_load_keep_every_weight_and_statistic(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".safetensors"]
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config.hidden_size == 32
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    torch.testing.assert_close(loaded(*inputs(model)).sample, model(*inputs(model)).sample)


@torch.no_grad()
def test_rectangular_model_survives_saving(tmp_path):
    model = tiny_model(sample_size=(8, 24))
    model.save_pretrained(tmp_path)
    loaded = DEMOTransformer2DModel.from_pretrained(tmp_path).eval()
    assert loaded.sample_shape == (8, 24)
    torch.testing.assert_close(loaded(*inputs(model, 2, 8, 24)).sample, model(*inputs(model, 2, 8, 24)).sample)


def test_automodel_finds_the_class(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(str(tmp_path)), DEMOTransformer2DModel)


@torch.no_grad()
def test_half_precision_keeps_batch_norm_and_positions_in_float32(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    half = DEMOTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.blocks[0].i2rmb.conv_norm.running_var.dtype == torch.float32
    assert half.pos_embed.dtype == torch.float32
    assert half.proj_out.weight.dtype == torch.bfloat16
    latents, timestep, labels = inputs(model)
    output = half(latents.bfloat16(), timestep, labels).sample
    assert output.dtype == torch.bfloat16
    expected = model(latents, timestep, labels).sample
    assert (output.float() - expected).norm() / expected.norm() < 0.03


@torch.no_grad()
def test_device_map_splits_between_blocks(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    placed = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
    placed |= {"pos_embed": "cpu", "blocks.0": "cpu", "blocks.1": "disk"}
    split = DEMOTransformer2DModel.from_pretrained(
        tmp_path / "model", device_map=placed, offload_folder=str(tmp_path / "offload")
    ).eval()
    assert split.blocks[1].modulation.weight.device.type == "meta"
    torch.testing.assert_close(split(*inputs(model)).sample, model(*inputs(model)).sample)


@pytest.mark.parametrize(("family", "lengths"), [("D-EMOv2", 1), ("DiT", 1), ("LightningDiT", 1), ("JiT", 2)])
@torch.no_grad()
def test_repeated_blocks_compile_to_one_graph_for_each_length_of_the_sequence(family, lengths):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = tiny_model(family, num_layers=4)
    expected = model(*inputs(model)).sample
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    torch.testing.assert_close(model(*inputs(model)).sample, expected)
    assert len(graphs) == lengths


@torch.no_grad()
def test_layerwise_casting_stores_products_small_and_leaves_norms():
    model = tiny_model()
    expected = model(*inputs(model)).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].i2rmb.proj_out.weight.dtype == torch.float8_e4m3fn
    assert model.blocks[0].i2rmb.conv_norm.weight.dtype == torch.float32
    assert model.label_embed.weight.dtype == torch.float32
    output = model(*inputs(model)).sample
    assert 0 < (output - expected).norm() / expected.norm() < 0.1


@torch.no_grad()
def test_group_offload_gives_the_same_output():
    model = tiny_model()
    expected = model(*inputs(model)).sample
    device = torch.device("cpu")
    model.enable_group_offload(onload_device=device, offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(model(*inputs(model)).sample, expected)


@torch.no_grad()
def test_lora_adapter_is_added_saved_and_loaded(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra lora")
    model = tiny_model()
    base = model(*inputs(model)).sample
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_qkv", "modulation"], init_lora_weights=False))
    adapted = model(*inputs(model)).sample
    assert (adapted - base).abs().max() > 1e-3
    model.save_lora_adapter(tmp_path)
    other = tiny_model()
    other.load_lora_adapter(str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(other(*inputs(model)).sample, adapted, atol=1e-6, rtol=1e-5)
    other.disable_adapters()
    torch.testing.assert_close(other(*inputs(model)).sample, base, atol=1e-6, rtol=1e-5)
