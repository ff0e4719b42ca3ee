"""timm's whole interface: the calls that its train.py, validate.py and inference.py make on a model.

Keyword for keyword those of timm 1.0.31 (its scripts are in no wheel or source archive); 1.0.20 is the floor. What
timm's own tests/test_models.py asks of every model, without weights, held too (docs/classification.md).
"""

import argparse
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
from helpers.models import randomize
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.models import create_model, load_checkpoint, resume_checkpoint, safe_model_name
from timm.models._manipulate import group_parameters, model_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.optim._param_groups import param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, dispatch_clip_grad, reparameterize_model
from torch import nn

import d_emo.timm_models
from d_emo import EMOv2Config, EMOv2ForImageClassification, create_classifier
from d_emo.classification.timm_models import POOLS
from d_emo.train import convert_emov2

NAMES = ("emov2_1m", "emov1_1m")
TINY = {"depths": (1, 1, 2, 2), "widths": (8, 8, 16, 16), "head_dims": (8, 8, 8, 8), "num_classes": 4}


def tiny(name="emov2_1m", **options):
    """A small network of timm's, whose logits are far from zero."""
    return randomize(create_model(name, **{**TINY, "layer_scale": 1.0, **options}))


def script_options(folder, **changes):
    """What `train.py DATA --model emov2_1m --img-size 64 --drop 0.1 ...` parses to, as far as models see it."""
    options = {
        "model": "emov2_1m", "pretrained": False, "in_chans": None, "num_classes": 4, "drop": 0.1, "drop_path": 0.1,
        "drop_block": None, "gp": None, "bn_momentum": None, "bn_eps": None, "torchscript": False,
        "initial_checkpoint": "", "model_kwargs": {"img_size": 64, "depths": (1, 1, 2, 2)}, "input_size": None,
        "img_size": 64, "opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "momentum": 0.9, "layer_decay": 0.75,
        "opt_eps": None, "opt_betas": None, "opt_kwargs": {}, "output": str(folder),
    }  # fmt: skip
    return argparse.Namespace(**{**options, **changes})


def build(args):
    """The call of train.py; None stands for an option that was not given."""
    return create_model(
        args.model,
        pretrained=args.pretrained,
        in_chans=args.in_chans or 3,
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        scriptable=args.torchscript,
        checkpoint_path=args.initial_checkpoint,
        **args.model_kwargs,
    )


def test_a_run_of_timms_train_py_and_validate_py(tmp_path):
    """One epoch of three batches with averaging, layer decay, checkpointing and bfloat16; resume; validate; convert."""
    torch.manual_seed(0)
    args = script_options(tmp_path)
    model = build(args)
    assert safe_model_name(args.model) == "emov2_1m" and model.num_classes == 4
    model.set_grad_checkpointing(enable=True)
    data = resolve_data_config(vars(args), model=model, verbose=False)
    assert data["input_size"] == (3, 64, 64) and data["interpolation"] == "bicubic" and data["crop_pct"] == 0.875
    model.to(device="cpu").to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    average = ModelEmaV3(model, decay=0.9, use_warmup=False, device="cpu")
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=1, updates_per_epoch=3)
    saver = CheckpointSaver(
        model=model, optimizer=optimizer, args=args, model_ema=average, amp_scaler=None, checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path), decreasing=True, max_history=2,
    )  # fmt: skip
    autocast = partial(torch.autocast, device_type="cpu", dtype=torch.bfloat16)
    before = model.head.weight.clone()
    model.train()
    for step in range(3):
        pixels = torch.randn(4, *data["input_size"]).contiguous(memory_format=torch.channels_last)
        with autocast():
            loss = nn.functional.cross_entropy(model(pixels), torch.arange(4))
        loss.backward()
        dispatch_clip_grad(model_parameters(model, exclude_head=False), value=1.0, mode="norm")
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=step)
        scheduler.step_update(num_updates=step, metric=loss.item())
    assert epochs >= 1 and not torch.equal(before, model.head.weight)
    saver.save_checkpoint(0, metric=loss.item())
    best = str(tmp_path / "model_best.pth.tar")

    again = build(args)
    assert resume_checkpoint(again, best, optimizer=None, loss_scaler=None, log_info=False) == 1
    assert_equal(again, model)
    load_checkpoint(again, best, use_ema=True)
    assert_equal(again, average.module)

    options = {"pretrained": False, "num_classes": 4, "in_chans": 3, "global_pool": None, "scriptable": False}
    validated = create_model(args.model, **options, **args.model_kwargs)  # validate.py's and inference.py's
    load_checkpoint(validated, best, True)
    validated = reparameterize_model(validated).eval()
    pixels = torch.randn(3, *data["input_size"])
    with torch.inference_mode(), autocast():
        assert validated(pixels).softmax(-1).topk(3).indices.shape == (3, 3)
    with torch.inference_mode():
        torch.testing.assert_close(validated(pixels), average.module.eval()(pixels))
    assert_equal(create_model(args.model, **options, **args.model_kwargs, checkpoint_path=best), average.module)


def assert_equal(one, other):
    """Both have the same tensors."""
    theirs = other.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(("weights", "key"), [("averaged", "state_dict_ema"), ("raw", "state_dict")])
def test_what_timms_trainer_saved_becomes_a_folder(tmp_path, weights, key):
    networks = {name: randomize(create_model("emov2_1m", num_classes=4)) for name in ("state_dict", "state_dict_ema")}
    states = {name: {f"_orig_mod.{k}": v for k, v in net.state_dict().items()} for name, net in networks.items()}
    torch.save(
        {"epoch": 1, "arch": "emov2_1m", "args": argparse.Namespace(lr=1.0), **states}, tmp_path / "best.pth.tar"
    )
    convert_emov2.main([str(tmp_path / "best.pth.tar"), "--output-dir", str(tmp_path / "out"), "--weights", weights])
    folder = EMOv2ForImageClassification.from_pretrained(tmp_path / "out")
    assert_equal(folder.emov2, networks[key])


@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_are_named_as_in_the_plain_network_and_its_files_load(name, tmp_path):
    plain = randomize(create_classifier(name.replace("emov", "EMOv").upper().replace("EMOV", "EMOv").replace("_", "-")))
    model = create_model(name)
    assert list(model.state_dict()) == list(plain.state_dict())
    prefixed = {f"emov2.{key}": tensor for key, tensor in plain.state_dict().items()}  # transformers' names
    torch.save(prefixed, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    assert_equal(create_model(name, pretrained=True, pretrained_cfg_overlay=overlay), plain)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        create_model(name, pretrained=True)


def test_images_of_other_channels_adapt_the_weights_of_a_file(tmp_path):
    model = tiny()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    grey = create_model(
        "emov2_1m", **TINY, layer_scale=1.0, in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay
    )
    assert grey.in_chans == 1
    torch.testing.assert_close(grey.stem.conv.weight, model.stem.conv.weight.sum(1, keepdim=True))
    assert grey(torch.randn(2, 1, 64, 64)).shape == (2, 4)


def test_a_folder_of_timms_format_brings_its_arguments(tmp_path):
    model = tiny(in_chans=1, img_size=64).eval()
    timm.models.save_for_hf(model, str(tmp_path))
    again = create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_equal(again, model)
    assert again.in_chans == 1 and again.stages[2].blocks[1].i2rmb.attn.clip_window


@pytest.mark.parametrize("pool", POOLS)
def test_every_pooling_is_timms(pool):
    from timm.layers import SelectAdaptivePool2d

    model = tiny(global_pool=pool).eval()
    features = model.forward_features(torch.randn(2, 3, 96, 64))
    pooled = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool))(features)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    assert pooled.shape[1] == model.head_hidden_size
    logits = model.forward_head(features)
    if pool:
        torch.testing.assert_close(logits, model.head(pooled))
    else:  # the head answers at every place
        expected = torch.einsum("bchw,kc->bkhw", features, model.head.weight) + model.head.bias[:, None, None]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_the_head_is_exchanged_and_stays_on_device_and_in_type():
    model = tiny().to(torch.bfloat16).eval()
    model.reset_classifier(7)
    assert model.get_classifier().weight.shape == (7, 16) and model.get_classifier().weight.dtype == torch.bfloat16
    assert not model.head.training and model.global_pool.pool_type == "avg" and model.num_classes == 7
    model.reset_classifier(7, "catavgmax")
    assert model(torch.randn(2, 3, 64, 64).bfloat16()).shape == (2, 7)
    model.reset_classifier(0, "")
    assert model(torch.randn(2, 3, 64, 64).bfloat16()).shape == (2, 16, 2, 2)
    plain = create_classifier("EMOv2-1M", num_classes=3).to("meta")
    plain.reset_classifier(5)
    assert plain.head.weight.is_meta


def test_dropout_and_stochastic_depth_act_in_training_only():
    pixels = torch.randn(4, 3, 64, 64)
    for options in ({"drop_rate": 0.9, "drop_path_rate": 0.0}, {"drop_rate": 0.0, "drop_path_rate": 0.9}):
        model = tiny(**options)
        with torch.no_grad():
            model.eval()
            torch.testing.assert_close(model(pixels), model(pixels), atol=0, rtol=0)
            model.train()
            for norm in model.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.eval()
            outputs = torch.stack([model(pixels) for _ in range(5)])
            assert outputs.std(0).max() > 1e-3, options
    dropped = tiny(drop_rate=0.75).train().forward_head(torch.ones(2000, 16, 1, 1), pre_logits=True)
    assert set(dropped.unique().tolist()) == {0.0, 4.0} and dropped.mean().item() == pytest.approx(1, abs=0.05)
    rates = [block.drop_path.probability for stage in tiny(drop_path_rate=0.4).stages for block in stage.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.4)


def test_norms_are_set_as_asked():
    norms = [m for m in tiny(bn_momentum=0.03, bn_eps=1e-3).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 5 and {(norm.momentum, norm.eps) for norm in norms} == {(0.03, 1e-3)}


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_gradients_and_statistics_are_the_plain_ones(name):
    pixels, results = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        torch.manual_seed(1)
        model = tiny(name, drop_path_rate=0.5).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(2)
        model(pixels).square().sum().backward()
        results.append((model, {key: parameter.grad for key, parameter in model.named_parameters()}))
    for key, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], gradient, atol=1e-6, rtol=1e-4, msg=key)
    for (key, one), (_, other) in zip(*(model.named_buffers() for model, _ in results), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=key)
    model.set_grad_checkpointing(False)
    assert not any(stage.gradient_checkpointing for stage in model.stages)


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_ordered_from_stem_to_head(name):
    model = tiny(name)
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert set(layers) == {key for key, _ in model.named_parameters()}
    order = ["stem.conv.weight", "stages.0.blocks.0.i2rmb.proj_out.weight", "stages.2.blocks.0.i2rmb.proj_out.weight",
             "stages.2.blocks.1.i2rmb.proj_out.weight", "stages.3.blocks.1.i2rmb.proj_out.weight",
             "head.weight"]  # fmt: skip
    numbers = [layers[key] for key in order]
    assert numbers == sorted(set(numbers)) and layers["norm.weight"] == layers[order[-2]]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == 6  # stem, four stages, head
    assert model.no_weight_decay() == set()
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.head.weight)] == 1
    assert scales[id(model.stem.conv.weight)] == pytest.approx(0.5 ** max(layers.values()))
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert undecayed == {id(p) for p in model.parameters() if p.dim() == 1}


@pytest.mark.parametrize("name", NAMES)
def test_intermediate_outputs_are_the_stages(name, tmp_path):
    model = tiny(name).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        stages, features = model.forward_stages(pixels), model.forward_features(pixels)
        final, maps = model.forward_intermediates(pixels)
        torch.testing.assert_close([final, *maps], [features, *stages])
        torch.testing.assert_close(model.forward_intermediates(pixels, indices=2, intermediates_only=True), stages[-2:])
        torch.testing.assert_close(model.forward_intermediates(pixels, indices=[0, -1], norm=True)[1],
                                   [stages[0], features])  # fmt: skip
        early = model.forward_intermediates(pixels, indices=[1], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early, [stages[1]])
        for feature_cls in ("list", "getter", "hook"):
            extractor = create_model(
                name, **TINY, layer_scale=1.0, features_only=True, out_indices=(1, 3, 4), feature_cls=feature_cls,
                pretrained=True, pretrained_cfg_overlay=overlay,
            ).eval()  # fmt: skip
            torch.testing.assert_close(list(extractor(pixels)), [stages[1], stages[3], stages[4]])
            assert extractor.feature_info.channels() == [8, 16, 16]
            assert extractor.feature_info.reduction() == [4, 16, 32]
        for last in range(5):
            pruned = tiny(name).eval()
            pruned.load_state_dict(model.state_dict())
            taken = pruned.prune_intermediate_layers([last], prune_norm=True)
            torch.testing.assert_close(
                pruned.forward_intermediates(pixels, taken, intermediates_only=True), [stages[last]]
            )
            torch.testing.assert_close(pruned(pixels), stages[last])
    with pytest.raises(ValueError, match="output_fmt='NLC' is not one of NCHW"):
        model.forward_intermediates(pixels, output_fmt="NLC")


@pytest.mark.parametrize("indices", [0, 6, -1, "x", [], [5], [-6], [1.5], True])
def test_places_that_are_none_are_refused(indices):
    model = tiny()
    for call in (
        lambda: model.forward_intermediates(torch.randn(2, 3, 64, 64), indices=indices),
        lambda: model.prune_intermediate_layers(indices),
        lambda: create_model("emov2_1m", **TINY, features_only=True, out_indices=indices),
    ):
        with pytest.raises(
            ValueError, match=r"indices=.* is not None \(all\), a number from 1 to 5 \(the last ones\), or"
        ):
            call()


def test_other_images_and_windows():
    assert create_model("emov2_1m", img_size=64).stages[2].blocks[1].i2rmb.attn.clip_window
    wide = create_model("emov2_1m", img_size=(256, 320))
    assert wide.stages[2].blocks[1].i2rmb.attn.window_size == 8
    with pytest.raises(ValueError, match="img_size=0 is not a whole number from 1 to 65536, or two"):
        create_model("emov2_1m", img_size=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_rate": 1.0}, "drop_rate=1.0 is not a number from 0 and below 1"),
        ({"drop_rate": float("nan")}, "drop_rate=nan"),
        ({"drop_path_rate": -0.1}, "drop_path_rate=-0.1"),
        ({"drop_path_rate": "a"}, "drop_path_rate='a'"),
        ({"drop_block_rate": 0.1}, "EMOv2 has no DropBlock; use drop_path_rate"),
        ({"global_pool": "median"}, "global_pool='median' is not None or one of"),
        ({"bn_momentum": 2.0}, "bn_momentum=2.0"),
        ({"bn_eps": -1.0}, "bn_eps=-1.0"),
        ({"in_chans": 0}, "in_chans=0 is not a whole number from 1"),
        ({"num_classes": -1}, "num_classes=-1 is not a whole number from 0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("emov2_1m", **options)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'not_an_argument'"):
        create_model("emov2_1m", not_an_argument=1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
def test_what_cannot_be_scripted_or_traced_by_fx_says_so():
    model = tiny()
    for scripted in (model, create_classifier("EMOv1-1M"), EMOv2ForImageClassification(EMOv2Config.of("EMOv2-1M"))):
        with pytest.raises(RuntimeError, match=r"cannot be scripted \(torch.jit.script\); use torch.compile"):
            torch.jit.script(scripted)
    with pytest.raises(ValueError, match=r"cannot be traced by torch\.fx"):
        torch.fx.symbolic_trace(model)


def test_conversions_that_train_py_makes():
    model = tiny().eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels)
        torch.testing.assert_close(torch.compile(model, backend="eager")(pixels), expected, atol=1e-5, rtol=1e-4)
        synced = convert_sync_batchnorm(tiny())
        assert any(isinstance(module, nn.SyncBatchNorm) for module in synced.modules())
        assert any("SplitBatchNorm" in type(m).__name__ for m in timm.layers.convert_splitbn_model(tiny(), 2).modules())
        set_fast_norm(True)
        try:
            torch.testing.assert_close(model(pixels), expected)
        finally:
            set_fast_norm(False)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(pixels).float(), expected, atol=0.05, rtol=0.05)


SCRIPT = "import sys, timm, beside\nprint(timm.is_model(beside.NAME), __name__, sys.argv[1:])\n"


@pytest.fixture
def script(tmp_path):
    """A script that knows nothing of this package, and a module beside it."""
    (tmp_path / "beside.py").write_text("NAME = 'emov2_1m'\n")
    (tmp_path / "train.py").write_text(SCRIPT)
    return str(tmp_path / "train.py")


def test_a_script_that_knows_nothing_of_this_package_finds_the_models(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python", "x"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    d_emo.timm_models.run_script([script, "--model", "x"])
    assert capsys.readouterr().out == "True __main__ ['--model', 'x']\n"


@pytest.mark.slow
def test_a_script_runs_from_the_command_line(script):
    command = [sys.executable, "-m", "d_emo.timm_models", script, "--model", "x"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("True __main__")


def test_a_missing_script_is_named(capsys):
    for arguments, message in (([], "no script was named"), (["absent.py"], "absent.py: there is no such script")):
        with pytest.raises(SystemExit, match=message):
            d_emo.timm_models.run_script(arguments)
