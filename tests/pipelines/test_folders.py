"""Folders of every kind where a pipeline or a network is expected, and Diffusers' DiT pipelines, both ways."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, UNet2DModel
from helpers.diffusers_dit import NAMES, diffusers_dit, dit_pipeline
from helpers.models import randomize, tiny_model
from helpers.pipelines import dit_scheduler, tiny_pipeline, tiny_vae
from safetensors.torch import load_file, save_file

from d_emo import (
    DEMOPipeline,
    DEMOTransformer2DModel,
    DiTBaselineTransformer2DModel,
    EMOv2Config,
    EMOv2ForImageClassification,
)
from d_emo.pipelines import open_pipeline
from d_emo.train import convert_dit


def latents(pipeline, **arguments):
    return pipeline(latents=noise(), num_inference_steps=4, output_type="latent", **arguments).images


def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def theirs_by_hand(pipeline, labels):
    """What their pipeline draws of the same noise, whose own takes none."""
    pipeline.scheduler.set_timesteps(4)
    sample = noise()
    for time in pipeline.scheduler.timesteps:
        predicted = pipeline.transformer(sample, time.expand(2), torch.tensor(labels)).sample[:, :4]
        sample = pipeline.scheduler.step(predicted, time, sample).prev_sample
    return sample


def test_their_pipelines_become_ours_and_back(tmp_path):
    theirs = dit_pipeline()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = DEMOPipeline.from_pretrained(tmp_path / "theirs")
    ours.set_progress_bar_config(disable=True)
    assert type(ours) is DEMOPipeline and type(ours.transformer) is DiTBaselineTransformer2DModel
    assert ours.id2label == NAMES and ours.scheduler.config.beta_end == 0.03
    expected = theirs_by_hand(theirs, [0, 2])
    found = latents(ours, class_labels=["tench", 2], guidance_scale=1.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.vae.state_dict(), theirs.vae.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    again = DEMOPipeline.from_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match="label 1000 .* this model has 3 classes"):
        again.to_dit_pipeline().save_pretrained(tmp_path / "back")
    back = DiTPipeline.from_pretrained(tmp_path / "back")
    assert back.labels == theirs.labels and back.scheduler.config.beta_end == 0.03
    torch.testing.assert_close(theirs_by_hand(back, [0, 2]), expected, atol=1e-5, rtol=1e-5)
    pictures = back([0, 1], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert pictures.shape == (2, 16, 16, 3)


def test_a_learned_variance_is_left_out_on_the_way_to_theirs(tmp_path):
    vae = tiny_vae()
    vae.register_to_config(shift_factor=None)
    model = randomize(DiTBaselineTransformer2DModel(8, 2, 4, 32, 1, 2, num_classes=1000, timestep_freq_shift=1)).eval()
    theirs = DEMOPipeline(model, dit_scheduler(), vae=vae).to_dit_pipeline()
    theirs.set_progress_bar_config(disable=True)
    assert type(theirs.scheduler) is DDPMScheduler and theirs.scheduler.config.variance_type == "fixed_small"
    assert theirs([3], guidance_scale=4.0, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def around_dit(vae):
    return DEMOPipeline(tiny_model("DiT", timestep_freq_shift=1), dit_scheduler(), vae=vae)


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (lambda: tiny_pipeline(), "DEMOTransformer2DModel is not the DiT network"),
        (lambda: around_dit(None), "a model of pixels has no VAE"),
        (lambda: around_dit(tiny_vae()), "shift_factor=0.3"),
    ],
)  # fmt: skip
def test_what_cannot_be_theirs_is_refused_by_name(pipeline, message):
    with pytest.raises(ValueError, match=message):
        pipeline().to_dit_pipeline()


def convert(*arguments):
    convert_dit.main([str(argument) for argument in arguments])


def test_the_command_converts_their_folders_and_files(tmp_path, capsys):
    theirs = dit_pipeline()
    theirs.save_pretrained(tmp_path / "theirs")
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in theirs.transformer.state_dict().items()}
    torch.save({"ema": wrapped}, tmp_path / "theirs.bin")
    save_file({name: tensor.contiguous() for name, tensor in theirs.transformer.state_dict().items()},
              tmp_path / "theirs.safetensors")  # fmt: skip
    sources = {"theirs": (), "theirs/transformer": ("--vae", "none")}
    for source, options in sources.items():
        convert(tmp_path / source, "--output-dir", tmp_path / "ours", *options)
        ours = DEMOPipeline.from_pretrained(tmp_path / "ours")
        assert (ours.vae is None) == bool(options)
        torch.testing.assert_close(
            ours.transformer.to_diffusers().state_dict(), theirs.transformer.state_dict(), atol=0, rtol=0
        )
    convert("--export", tmp_path / "ours", tmp_path / "back", "--layout", "diffusers")
    assert "DiTTransformer2DModel of Diffusers in" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is there already"):
        convert("--export", tmp_path / "ours", tmp_path / "back", "--layout", "diffusers")
    for name in ("theirs.bin", "theirs.safetensors"):
        with pytest.raises(SystemExit, match=r"2 blocks of 32 channels are no published size.*--num-heads"):
            convert(tmp_path / name, "--output-dir", tmp_path / "no", "--vae", "none")
        convert(tmp_path / name, "--output-dir", tmp_path / name[-4:], "--vae", "none", "--num-heads", 2)
        found = DEMOPipeline.from_pretrained(tmp_path / name[-4:]).transformer
        assert torch.equal(found.proj_out.weight, theirs.transformer.proj_out_2.weight)
        assert found.config.timestep_freq_shift == 1
    with pytest.raises(SystemExit, match="which is for DiT's objective"):
        convert(tmp_path / "theirs", "--output-dir", tmp_path / "no", "--objective", "sit")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder of each kind that a library saves."""
    root = tmp_path_factory.mktemp("zoo")
    unet = UNet2DModel(
        8, 3, 3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    config = EMOv2Config(depths=(1, 1, 2, 1), widths=(8, 8, 16, 16), head_dims=(8, 8, 8, 8), num_labels=2)
    for name, saved in {
        "unet": unet, "vae": tiny_vae(), "scheduler": DDIMScheduler(), "ddpm": DDPMPipeline(unet, DDPMScheduler()),
        "classifier": EMOv2ForImageClassification(config), "demo": tiny_model(), "dit": tiny_model("DiT"),
        "pipeline": tiny_pipeline(), "their dit": diffusers_dit(),
    }.items():  # fmt: skip
        saved.save_pretrained(root / name)
    (root / "empty").mkdir()
    (root / "run" / "checkpoint-10").mkdir(parents=True)
    (root / "run" / "checkpoint-10" / "model_index.json").write_text("{}")
    for name, text in (("broken", "{"), ("list", "[]"), ("nameless", '{"_class_name": 3}')):
        (root / name).mkdir()
        for file in ("config.json", "model_index.json"):
            (root / name / file).write_text(text)
    return root


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unet", "no pipeline in it .* but a UNet2DModel"),
        ("vae", "no pipeline in it .* but a AutoencoderKL"),
        ("scheduler", r"no pipeline in it .* but a scheduler \(DDIMScheduler\)"),
        ("ddpm", "of a DDPMPipeline, which has no transformer"),
        ("classifier", "but a EMOv2ForImageClassification of transformers"),
        ("demo", "but a DEMOTransformer2DModel"),
        ("their dit", "but a DiTTransformer2DModel"),
        ("empty", "but nothing that a library saved"),
        ("run", r"but folders of pipelines \(checkpoint-10\); .* newest checkpoint, checkpoint-10 there"),
        ("broken", "model_index.json is damaged .*; restore it"),
        ("list", "model_index.json is damaged .a list instead of a table"),
        ("nameless", "of a 3, which has no transformer"),
        ("demo/config.json", "is a file; pass the folder"),
    ],
)
def test_no_pipeline_is_refused_by_name(zoo, name, message):
    for load in (DEMOPipeline.from_pretrained, lambda folder: open_pipeline(str(folder))):
        with pytest.raises(ValueError, match=message) as refusal:
            load(zoo / name)
        assert "\n" not in str(refusal.value) and str(refusal.value).count(str(zoo / name)) <= 2


def test_a_mistyped_name_in_a_folder_that_is_there_is_not_asked_of_the_hub(tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match=r"^runs/mien: neither a pipeline folder, nor a packaged model"):
        open_pipeline("runs/mien")
    with pytest.raises(
        ValueError, match=r"^nobody/mien: neither a pipeline folder .there is no such folder. nor reach"
    ):
        open_pipeline("nobody/mien")


@pytest.mark.parametrize("kind", [DEMOTransformer2DModel, DiTBaselineTransformer2DModel])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unet", "is of a UNet2DModel, not of a .* load it with UNet2DModel.from_pretrained"),
        ("vae", "is of a AutoencoderKL"),
        ("scheduler", r"holds a scheduler \(DDIMScheduler\), not a"),
        ("ddpm", r"holds a pipeline \(DDPMPipeline\), not a .* subfolder='transformer'"),
        ("pipeline", r"holds a pipeline \(DEMOPipeline\), not a .* subfolder='transformer'"),
        ("classifier", "is of a EMOv2ForImageClassification of transformers .*load it with transformers"),
        ("empty", "holds nothing that a library saved"),
        ("broken", "config.json is damaged .*; restore it"),
        ("list", "config.json is damaged .a list instead of a table"),
        ("demo/config.json", "is a file; pass the folder"),
    ],
)
def test_no_network_is_refused_by_name(zoo, kind, name, message):
    with pytest.raises(ValueError, match=message) as refusal:
        kind.from_pretrained(zoo / name)
    assert "\n" not in str(refusal.value)


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(transformer=["diffusers", "UNet2DModel"]), "with a UNet2DModel"),
        (lambda index: index.update(transformer=["os", "system"]), "takes transformer from 'os', not"),
        (lambda index: index.update(scheduler=["my_code", "Mine"]), "takes scheduler from 'my_code'"),
        (lambda index: index.update(transformer="demo"), "names transformer='demo', not a library and a class"),
        (lambda index: index.update(scheduler=[1, 2]), "names scheduler="),
        (lambda index: index.update(transformer=["d_emo", "EMOv2ForImageClassification"]), "which is no network"),
        (lambda index: index.update(transformer=["d_emo", "create_model"]), "which is no network"),
        (lambda index: index.update(scheduler=["diffusers", "Mine"]), "'Mine'], which is no scheduler; restore it"),
        (lambda index: index.update(scheduler=["diffusers", "AutoencoderKL"]), "which is no scheduler"),
        (lambda index: index.update(vae=["diffusers", "Mine"]), "names vae=.*'Mine' is no autoencoder .*RAE"),
        (lambda index: index.update(vae=["diffusers", "utils"]), "names vae=.*'utils' is no autoencoder"),
        (lambda index: index.update(vae=["d_emo", "DEMOPipeline"]), "names vae=.*'DEMOPipeline' is no auto"),
        (lambda index: index.pop("scheduler"), "has no scheduler"),
        (lambda index: index.update(default_num_inference_steps=0), "default_num_inference_steps=0"),
        (lambda index: index.update(default_num_inference_steps="9"), "default_num_inference_steps='9'"),
        (lambda index: index.update(default_num_inference_steps=10**9), "default_num_inference_steps=1000000000"),
        (lambda index: index.update(id2label={"7": "far"}), "id2label names class 7"),
        (lambda index: index.update(id2label="tench"), "id2label='tench'"),
    ],
)  # fmt: skip
def test_a_pipelines_index_is_checked(tmp_path, change, message):
    tiny_pipeline().save_pretrained(tmp_path)
    edited(tmp_path / "model_index.json", change)
    with pytest.raises(ValueError, match=message):
        DEMOPipeline.from_pretrained(tmp_path)


def test_a_damaged_decoder_is_no_part(tmp_path):
    DEMOPipeline(tiny_model(num_classes=3), dit_scheduler(), vae=tiny_vae()).save_pretrained(tmp_path)
    assert isinstance(DEMOPipeline.from_pretrained(tmp_path).vae, AutoencoderKL)
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for wrong, message in (
        (
            {name: state[name] for name in list(state)[1:]},
            "its vae does not load .config.json and weights are",
        ),
        ({**state, "more.weight": torch.zeros(1)}, "not in the model: more.weight"),
        ({**state, "decoder.conv_in.weight": torch.zeros(1)}, "its vae does not load"),
    ):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=message) as refusal:
            DEMOPipeline.from_pretrained(tmp_path)
        assert "\n" not in str(refusal.value)
    assert DEMOPipeline.from_pretrained(tmp_path, vae=None).vae is None


@pytest.mark.parametrize(
    ("file", "field", "values"),
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", (0, -1, 10**12, "1000", None, float("nan"), [])),
        ("vae/config.json", "block_out_channels", ([], [0], [10**9], "8", None, [8.5])),
        ("vae/config.json", "latent_channels", (0, -4, 10**9, "4", True)),
        ("vae/config.json", "layers_per_block", (0, 10**9)),
        ("vae/config.json", "scaling_factor", (0, float("nan"), float("inf"), "0.18", -1)),
        ("vae/config.json", "shift_factor", (float("nan"), "0")),
    ],
)
def test_parts_of_diffusers_are_in_range_before_they_are_made(file, field, values, tmp_path):
    DEMOPipeline(tiny_model(num_classes=3), dit_scheduler(), vae=tiny_vae()).save_pretrained(tmp_path)
    for value in values:
        edited(tmp_path / file, lambda content: content.update({field: value}))  # noqa: B023
        with pytest.raises(ValueError, match=rf"in {file}, (DDPMScheduler|AutoencoderKL): {field}=") as refusal:
            DEMOPipeline.from_pretrained(tmp_path)
        assert "\n" not in str(refusal.value)
