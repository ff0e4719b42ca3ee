"""The network of V-EMOv2: tensors, attention in time and space, clips of other sizes, gradients, what it refuses."""

import pytest
import torch
from helpers.models import randomize
from helpers.videos import large

from d_emo import EMOv2Config, VEMOv2Config, create_video_classifier, list_video_classifiers
from d_emo.kernels import use_backend
from d_emo.video.attention import VideoWindowAttention
from d_emo.video.v_emov2 import VEMOv2

TINY = {"depths": (1, 1, 2, 2), "widths": (8, 8, 16, 16), "head_dims": (8, 8, 8, 8), "num_classes": 5}


def network(**options):
    return randomize(VEMOv2(**{**TINY, **options})).eval()


def clips(batch=2, frames=4, height=64, width=64, channels=3, seed=0):
    return torch.randn(batch, frames, channels, height, width, generator=torch.Generator().manual_seed(seed))


# ---- tensors ---------------------------------------------------------------------------------------------------------


def test_names_are_listed_by_a_pattern():
    assert list_video_classifiers("*-5M") == ["V-EMOv2-5M"] and len(list_video_classifiers()) == 4


def test_head_and_tensors_are_those_of_the_published_log():
    with torch.device("meta"):
        state = VEMOv2().state_dict()
    assert tuple(state["head.weight"].shape) == (400, 288)
    assert {tuple(t.shape[2:]) for name, t in state.items() if name.endswith("i2rmb.conv.weight")} == {(5, 5, 5)}
    assert tuple(state["stem.conv.weight"].shape) == (24, 3, 3, 3, 3)
    # The log has queries with keys, and values, as two tensors each with a bias, in ten attending blocks.
    trained = [name for name in state if "running" not in name and "num_batches" not in name]
    assert len(trained) + 2 * 10 == 194


# ---- attention -------------------------------------------------------------------------------------------------------


def dense_attention(attention, tokens, kind, window):
    """Attention of all tokens at once, of which only those of the same window see each other."""
    _, *grid, _ = tokens.shape
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid))  # (N, 3)
    sides = torch.tensor(window)
    groups = places // sides if kind == "neighborhood" else places % (torch.tensor(grid) // sides)
    apart = (groups[:, None] != groups[None]).any(-1)  # (N, N)
    qkv = attention.to_qkv(tokens).flatten(1, 3)
    q, k, v = qkv.split((attention.dim, attention.dim, attention.inner_dim), dim=-1)
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(apart, float("-inf"))
    mixed = scores.softmax(-1) @ torch.nn.functional.gelu(v)  # (B, h, N, e)
    return mixed.transpose(1, 2).flatten(2).unflatten(1, grid)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["spanning", "neighborhood", "remote"])
@pytest.mark.parametrize(("grid", "window"), [((4, 6, 8), (2, 3, 2)), ((2, 4, 4), (2, 2, 2)), ((2, 3, 3), (2, 3, 3))])
def test_windows_are_cut_in_all_three_axes(grid, window, kind, backend):
    attention = randomize(VideoWindowAttention(8, 2, 3.0, window, kind)).eval()
    tokens = torch.randn(2, *grid, 8, generator=torch.Generator().manual_seed(1))
    kinds = ("neighborhood", "remote") if kind == "spanning" else (kind,)
    with torch.no_grad(), use_backend(backend):
        expected = sum(dense_attention(attention, tokens, one, window) for one in kinds)
        torch.testing.assert_close(attention(tokens), expected, atol=1e-5, rtol=1e-5)
    saved = attention.macs_saved(2, *grid, 8)
    assert bool(saved) == (grid == window and kind == "spanning")


def test_grids_are_padded_up_to_whole_windows_or_windows_clipped():
    tokens = torch.randn(1, 3, 4, 7, 8, generator=torch.Generator().manual_seed(2))
    attention = randomize(VideoWindowAttention(8, 2, 2.0, (2, 5, 5))).eval()
    padded = torch.nn.functional.pad(tokens, (0, 0, 0, 3, 0, 1, 0, 1))
    with torch.no_grad():
        assert attention(tokens).shape == (1, 3, 4, 7, 16)
        torch.testing.assert_close(attention(tokens), attention(padded)[:, :3, :4, :7])
    clipped = VideoWindowAttention(8, 2, 2.0, (2, 5, 5), clip_window=True)
    assert clipped.window(1, 4, 7) == (1, 4, 5) and clipped.padding(1, 4, 7) == (0, 0, 3)


# ---- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 3, 4, 6])
@pytest.mark.parametrize(("height", "width"), [(96, 128), (20, 33)])
def test_other_clips_run_and_depend_on_every_frame(frames, height, width):
    model = network()
    pixels = clips(1, frames, height, width).requires_grad_()
    model(pixels).square().sum().backward()
    assert all(frame.abs().sum() > 0 for frame in pixels.grad[0])


def test_strides_in_space_and_time():
    shapes = [tuple(stage.shape[2:]) for stage in network().forward_stages(clips(1, 8, 160, 160))]
    assert shapes == [(4, 80, 80), (4, 40, 40), (4, 20, 20), (4, 10, 10), (4, 5, 5)]
    shapes = [tuple(s.shape[2:]) for s in network(temporal_strides=(1, 1, 2, 1, 2)).forward_stages(clips(1, 7, 32, 32))]
    assert [shape[0] for shape in shapes] == [7, 7, 4, 4, 2]


@pytest.mark.parametrize("options", [{}, {"attention_type": "none"}, {"attention_type": "remote", "clip_window": True},
                                     {"layer_scale": None, "in_channels": 1, "num_classes": 1}])  # fmt: skip
def test_every_parameter_has_a_gradient(options):
    model = network(**options).train()
    model(clips(2, 4, channels=options.get("in_channels", 3))).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_a_reversed_clip_and_another_clip_are_told_apart():
    model, clip = large(network()), clips(1)
    with torch.no_grad():
        logits = model(clip)
        for other in (clip.flip(1), clips(1, seed=1)):
            assert (model(other) - logits).abs().max() > 0.1


def test_samples_of_a_batch_do_not_see_each_other():
    model, both = network(), clips(2)
    with torch.no_grad():
        torch.testing.assert_close(model(both)[1:], model(both[1:]), atol=1e-5, rtol=1e-5)


def test_checkpointing_changes_neither_gradients_nor_statistics():
    results = []
    for again in (False, True):
        model = network(drop_path=0.0, dropout=0.0).train()
        for stage in model.stages:
            stage.gradient_checkpointing = again
        model(clips()).square().sum().backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    torch.testing.assert_close(*results)


def test_dropout_and_dropped_branches_act_in_training_alone():
    model = network(drop_path=0.9)
    assert torch.equal(model(clips()), model(clips()))
    for part in (model.dropout, model.stages[3].blocks[1].drop_path):
        assert part.train()(torch.ones(64, 1, 1, 1, 1)).unique().numel() == 2


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (clips(1)[0], r"shape \(4, 3, 64, 64\), not \(B, T, 3, H, W\); for one clip pass pixel_values\[None\]\."),
        (clips(1).transpose(1, 2), r"4 channels, the model takes 3 \(frames come before .*permute\(0, 2, 1, 3, 4\)\)"),
        (clips(1).permute(0, 1, 3, 4, 2), r"64 channels, .*\(channels come third: permute\(0, 1, 4, 2, 3\)\)"),
        (clips(1, channels=5), r"5 channels, the model takes 3\.$"),
        (clips(1)[:, :0], r"no pixel"),
        (clips(1)[0, 0], r"shape \(3, 64, 64\), not \(B, T, 3, H, W\)\.$"),
        (clips(1).byte(), r"torch\.uint8; pass normalised floating-point numbers"),
        (clips(1).double(), r"torch\.float64, the model is torch\.float32; pass pixel_values\.to\(torch\.float32\)"),
        ([1, 2], r"is a list; pass a tensor \(B, T, 3, H, W\)"),
    ],
)
def test_clips_of_other_shapes_and_types_are_refused_in_one_line(pixels, message):
    with pytest.raises(ValueError, match=message) as caught:
        network()(pixels)
    assert "\n" not in str(caught.value)


def test_a_single_value_is_no_batch_to_train_on():
    model = network().train()
    with pytest.raises(ValueError, match=r"one clip of 2 x 32 x 32 leaves BatchNorm a single value .*pass 2 clips"):
        model(clips(1, 2, 32, 32))
    assert model(clips(2, 2, 32, 32)).shape == model.eval()(clips(2, 2, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 5}, r"VEMOv2: window_size=5 is not a list of 3 to 3 values"),
        ({"window_size": (2, 5)}, r"window_size=\(2, 5\) is not a list of 3 to 3"),
        ({"temporal_strides": (2, 1)}, r"temporal_strides=\[2, 1\] has 2 entries; pass 5"),
        ({"head_dims": (8, 8, 5, 8)}, r"head_dims\[2\]=5 cuts widths\[2\]=16"),
        ({"attention_type": "global"}, r"attention_type='global' is not one of"),
        ({"dropout": 1.0}, r"dropout=1\.0 is not a number from 0 and below 1"),
        ({"kernel_sizes": (4, 5, 5, 5)}, r"kernel_sizes=\(4, 5, 5, 5\) is not .*odd"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VEMOv2(**{**TINY, **options})


def test_names_of_classes_say_how_many_there_are():
    for build in (create_video_classifier, VEMOv2Config.of):
        with torch.device("meta"):
            model = build("V-EMOv2-1M", id2label=["left", "right"])
        config = getattr(model, "config", model)
        assert (config.num_labels, config.label2id) == (2, {"left": 0, "right": 1})
    with pytest.raises(ValueError, match=r"num_classes=3, and id2label has 2 names; leave num_classes out"):
        create_video_classifier("V-EMOv2-1M", 3, id2label=["left", "right"])


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ValueError, match=r"video classifier 'v_emov2_5m' is unknown; did you mean V-EMOv2-5M"):
        create_video_classifier("v_emov2_5m")
    with pytest.raises(ValueError, match=r"VEMOv2Config has no num_frame; did you mean num_frames\?"):
        create_video_classifier(num_frame=8)
    with pytest.raises(ValueError, match=r"VEMOv2Config has no in_channels; did you mean num_channels\?"):
        create_video_classifier(in_channels=1)


def test_numbers_and_names_of_classes_that_disagree_are_refused():
    for config, name in ((VEMOv2Config, "V-EMOv2-1M"), (EMOv2Config, "EMOv2-1M")):
        with pytest.raises(ValueError, match="num_labels=3, and id2label has 2 names; leave num_labels out"):
            config.of(name, num_labels=3, id2label=["left", "right"])


@pytest.mark.parametrize("grid", [(2, 1, 1), (2, 2, 2), (4, 4, 4), (4, 7, 7)])
def test_the_convolution_has_the_gradients_of_float32_but_for_rounding(grid):
    """On a CPU PyTorch's own are undefined in bfloat16 on small grids, for weights and for pixels."""
    torch.manual_seed(0)
    block = VEMOv2(**TINY).stages[3].blocks[-1].i2rmb
    tokens, weights = torch.randn(2, *grid, 16, requires_grad=True), torch.randn(2, *grid, 16)
    found = []
    for rounded in (False, True):
        for _ in range(3):
            block.zero_grad()
            tokens.grad = None
            junk = [torch.full((size,), torch.nan, dtype=torch.bfloat16) for size in (64, 500, 2000, 8000) * 8]
            del junk
            with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
                answer = block(tokens)
            (answer.float() * weights).sum().backward()
            found.append((block.conv.weight.grad, tokens.grad))
    for gradients in found[3:]:
        for ours, exact in zip(gradients, found[0], strict=True):
            scale = exact.abs().max()
            torch.testing.assert_close(ours / scale, exact / scale, rtol=0, atol=0.1)
