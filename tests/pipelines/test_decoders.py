"""Pipelines around autoencoders of every class: saved and loaded, decoded, another one refused by name."""

import copy
import dataclasses
import json
import shutil

import accelerate
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, DiffusionPipeline
from diffusers.utils import logging
from helpers.autoencoders import CONFIGS, tiny_autoencoder
from helpers.models import tiny_model
from helpers.pipelines import dit_scheduler, images, tiny_pipeline
from safetensors.torch import load_file, save_file

from d_emo import DEMOPipeline
from d_emo.images.autoencoders import latent_space
from d_emo.images.latents import decode_latents

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def pipeline_around(vae, latent_space_=None, **config):
    """A model that fits an autoencoder, of 32 pixels."""
    space = latent_space(vae)
    patch = 1 if space.factor == 16 else 2
    model = tiny_model(in_channels=space.channels, sample_size=32 // space.factor, num_classes=3,
                       **{"patch_size": patch, **config})  # fmt: skip
    pipeline = DEMOPipeline(model, dit_scheduler(), vae=vae, latent_space=latent_space_)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    return images(pipeline, **{"output_type": "pt", "num_inference_steps": 2, **arguments})


def measured(space, **statistics):
    """A description with statistics of a data set in place of the autoencoder's own."""
    values = {"mean": [0.5] * space.channels, "std": [0.25] * space.channels, "measured_on": "digits", **statistics}
    return {**dataclasses.asdict(space), **values}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pipeline_comes_back_with_its_autoencoder_and_description(name, tmp_path):
    vae = tiny_autoencoder(name)
    pipeline, space = pipeline_around(vae), latent_space(vae)
    expected, latents = pictures(pipeline), pictures(pipeline, output_type="latent")
    assert expected.shape == (2, 3, 32, 32) and expected.std() > 0.02
    if name != "ConsistencyDecoderVAE":  # which draws noise
        torch.testing.assert_close(expected, (decode_latents(vae, space, latents) / 2 + 0.5).clamp(0, 1), **CLOSE)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", type(vae).__name__]
    assert index["latent_space"] == json.loads(json.dumps(dataclasses.asdict(space)))
    for loader in (DEMOPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is DEMOPipeline and type(loaded.vae) is type(vae) and loaded.latent_space == space
        torch.testing.assert_close(pictures(loaded), expected, **CLOSE)
    again = DEMOPipeline.from_pipe(loaded)
    assert again.latent_space == space and again.vae is loaded.vae


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_loader_fills_no_autoencoder_with_random_weights(name, tmp_path, caplog):
    pipeline_around(tiny_autoencoder(name)).save_pretrained(tmp_path)
    logging.enable_propagation()
    DiffusionPipeline.from_pretrained(tmp_path)
    logging.disable_propagation()
    assert not [record for record in caplog.records if "config attributes" in record.message]
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    lacking = min(state)
    del state[lacking]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"this vae does not load .*missing in the file: {lacking};"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_diffusers_ways_of_loading_reach_the_autoencoder(tmp_path):
    """Types, variants and maps of devices, which plan with a model without weights."""
    pipeline_around(tiny_autoencoder("AutoencoderTiny")).save_pretrained(tmp_path, variant="fp16")
    loaded = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16, device_map="balanced")
    assert isinstance(loaded.vae, AutoencoderTiny) and loaded.vae.dtype == torch.float16 and not loaded.vae.training
    assert torch.isfinite(next(loaded.vae.parameters())).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pipeline_refuses_every_other_autoencoder_by_name(name, tmp_path):
    pipeline = pipeline_around(tiny_autoencoder(name))
    pipeline.save_pretrained(tmp_path)
    for other in CONFIGS:
        if other == name:
            continue
        vae = tiny_autoencoder(other)
        message = "|".join((
            f"autoencoder {name.split()[0]} -> {type(vae).__name__}",  # another class, or
            "mean .* -> .*; std .* -> ",  # the same with other statistics
        ))  # fmt: skip
        with pytest.raises(ValueError, match=message) as refusal:
            DEMOPipeline.from_pretrained(tmp_path, vae=vae, transformer=pipeline.transformer)
        assert "\n" not in str(refusal.value)
    twin = tiny_autoencoder(name, seed=0)
    assert DEMOPipeline.from_pretrained(tmp_path, vae=twin).vae is twin


def test_a_folder_in_which_the_autoencoder_was_exchanged_is_refused(tmp_path):
    pipeline_around(tiny_autoencoder("AutoencoderKL")).save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    tiny_autoencoder("AutoencoderTiny").save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"its config.json is of a AutoencoderTiny, the model_index.json says Auto"):
        DEMOPipeline.from_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderTiny"]}))
    for loader in (DEMOPipeline, DiffusionPipeline):
        with pytest.raises(ValueError, match="autoencoder AutoencoderKL -> AutoencoderTiny"):
            loader.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "latent_space": {"autoencoder": "VQModel"}}))
    with pytest.raises(ValueError, match="latent_space"):
        DEMOPipeline.from_pretrained(tmp_path, vae=tiny_autoencoder())


def test_a_model_of_other_channels_is_refused_where_the_pipeline_is_made():
    for name, channels in (("AutoencoderDC", 8), ("AutoencoderRAE", 64)):
        with pytest.raises(ValueError, match=f"the transformer takes 4 channels, latents of {name} have {channels}"):
            DEMOPipeline(tiny_model(num_classes=3), dit_scheduler(), vae=tiny_autoencoder(name))


def test_what_is_no_autoencoder_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"'DEMOTransformer2DModel' is no autoencoder .*AutoencoderKL, AutoencoderRAE"):
        DEMOPipeline(tiny_model(num_classes=3), dit_scheduler(), vae=tiny_model())


def test_a_pipeline_of_before_there_were_descriptions_loads_as_before(tmp_path):
    pipeline = pipeline_around(tiny_autoencoder("AutoencoderKL"))
    expected = pictures(pipeline)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["latent_space"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = DEMOPipeline.from_pretrained(tmp_path)
    assert loaded.latent_space == pipeline.latent_space
    torch.testing.assert_close(pictures(loaded), expected, **CLOSE)
    bare = DEMOPipeline.from_pretrained(tmp_path, vae=None)
    bare.vae = pipeline.vae
    assert pictures(bare).shape == expected.shape


@torch.no_grad()
@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderRAE", "AutoencoderKLFlux2"])
def test_measured_statistics_replace_the_autoencoders_own_and_stay_with_the_model(name, tmp_path):
    vae = tiny_autoencoder(name)
    space = latent_space(vae)
    pipeline = pipeline_around(vae, measured(space))
    latents, expected = pictures(pipeline, output_type="latent"), pictures(pipeline)
    plain = dataclasses.replace(space, mean=(0.0,), std=(1.0,))
    torch.testing.assert_close(
        expected, (decode_latents(vae, plain, 0.25 * latents + 0.5) / 2 + 0.5).clamp(0, 1), **CLOSE
    )
    assert (expected - pictures(pipeline_around(tiny_autoencoder(name)))).abs().max() > 1e-3
    pipeline.save_pretrained(tmp_path)
    for made in (
        DEMOPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path),
        DEMOPipeline.from_pipe(pipeline), DEMOPipeline(**pipeline.components), copy.deepcopy(pipeline),
    ):  # fmt: skip
        assert made.latent_space.measured_on == "digits"
        torch.testing.assert_close(pictures(made), expected, **CLOSE)
    pipeline.vae = tiny_autoencoder(name, seed=1)
    assert pipeline.latent_space.std == (0.25,) * space.channels


def test_a_quick_decoder_of_the_same_latents_goes_by_its_own_statistics(tmp_path):
    pipeline = pipeline_around(tiny_autoencoder("AutoencoderKL"))
    latents = pictures(pipeline, output_type="latent")
    pipeline.vae = quick = tiny_autoencoder("AutoencoderTiny")
    expected = (quick.decode(latents / 0.9).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pictures(pipeline), expected.detach(), **CLOSE)
    with pytest.raises(ValueError, match=r"pipe.vae is another autoencoder .*AutoencoderKL -> AutoencoderTiny"):
        pipeline.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    pipeline.vae = tiny_autoencoder("AutoencoderDC")
    with pytest.raises(ValueError, match=r"AutoencoderDC does not decode .*channels 4 -> 8.* its own AutoencoderKL"):
        pictures(pipeline)
    pipeline.vae = tiny_autoencoder(
        "AutoencoderTiny", encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1,) * 3, num_decoder_blocks=(1,) * 3,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"AutoencoderTiny does not decode .*factor 2 -> 4"):
        pictures(pipeline)
    pipeline.vae = None
    with pytest.raises(ValueError, match="output_type='pt': the model draws latents of AutoencoderKL"):
        pictures(pipeline)
    torch.testing.assert_close(pictures(pipeline, output_type="latent"), latents)


def test_statistics_that_were_measured_are_no_quick_decoders():
    vae = tiny_autoencoder("AutoencoderKL")
    pipeline = pipeline_around(vae, measured(latent_space(vae)))
    pipeline.vae = tiny_autoencoder("AutoencoderTiny")
    with pytest.raises(ValueError, match=r"AutoencoderTiny does not decode .*\(statistics measured on digits\)"):
        pictures(pipeline)


def test_a_pipeline_of_pixels_takes_no_autoencoder_of_other_channels():
    pipeline = tiny_pipeline()
    assert pipeline.latent_space is None
    pipeline.vae = tiny_autoencoder()
    with pytest.raises(ValueError, match="the transformer takes 3 channels, latents of AutoencoderKL have 4"):
        pictures(pipeline)


def test_statistics_among_weights_survive_half_precision(tmp_path):
    pipeline = pipeline_around(tiny_autoencoder("AutoencoderKLFlux2"))
    space = pipeline.latent_space
    pipeline.to(dtype=torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = DEMOPipeline.from_pretrained(tmp_path, dtype=dtype)
        assert latent_space(loaded.vae) != space and loaded.latent_space == space
        assert pictures(loaded).dtype == torch.float32


@pytest.mark.parametrize("name", ["AutoencoderRAE", "ConsistencyDecoderVAE", "AutoencoderDC"])
def test_half_precision_decodes_about_the_same(name):
    pipeline = pipeline_around(tiny_autoencoder(name))
    latents = torch.randn(2, *pictures(pipeline, output_type="latent").shape[1:])
    space, vae = pipeline.latent_space, pipeline.vae
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    whole = decode_latents(vae, space, latents, [g.clone_state() for g in generators])
    half = decode_latents(vae.to(torch.bfloat16), space, latents, generators)
    assert half.dtype == torch.float32 and (half - whole).abs().mean() < 0.2 * whole.abs().mean()


def test_a_decoder_that_draws_noise_is_repeatable_and_its_images_do_not_depend_on_their_batch():
    pipeline = pipeline_around(tiny_autoencoder("ConsistencyDecoderVAE"))
    three = pictures(pipeline, labels=(0, 1, 2))
    torch.testing.assert_close(pictures(pipeline, labels=(0, 1, 2)), three, atol=0, rtol=0)
    torch.testing.assert_close(pictures(pipeline, labels=(1, 2), seed=1), three[1:], **CLOSE)
    one = [pictures(pipeline, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    torch.testing.assert_close(*one, atol=0, rtol=0)
    other = pictures(pipeline, generator=torch.Generator().manual_seed(4))
    assert (one[0] - other).abs().mean() > 0.01


def test_an_autoencoder_of_one_size_gives_that_size_only():
    pipeline = pipeline_around(tiny_autoencoder("AutoencoderRAE"))
    assert pictures(pipeline, height=32, width=32).shape == (2, 3, 32, 32)
    for argument in ("height", "width"):
        with pytest.raises(ValueError, match=f"{argument}=64: AutoencoderRAE decodes to 32 pixels only; pass 32"):
            pictures(pipeline, **{argument: 64})
    other = pipeline_around(tiny_autoencoder("AutoencoderDC"))
    assert pictures(other, height=16, width=24).shape == (2, 3, 16, 24)
    with pytest.raises(ValueError, match=r"height=18 .*multiple of 4 \(patch_size 2 x VAE factor 2\); use 16"):
        pictures(other, height=18)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoders_whose_weights_lie_elsewhere_give_the_same(name):
    """As after `enable_sequential_cpu_offload`."""
    pipeline = pipeline_around(tiny_autoencoder(name))
    expected = pictures(pipeline)
    accelerate.cpu_offload(pipeline.vae, torch.device("cpu"), offload_buffers=True)
    assert any(parameter.device.type == "meta" for parameter in pipeline.vae.parameters())
    if name == "ConsistencyDecoderVAE":
        with pytest.raises(ValueError, match=r"ConsistencyDecoderVAE .* use enable_model_cpu_offload\(\)"):
            pictures(pipeline)
        return
    torch.testing.assert_close(pictures(pipeline), expected, **CLOSE)


SLICES = {"AutoencoderKL", "AutoencoderKL per channel", "AutoencoderRAE", "AutoencoderDC", "AutoencoderKLFlux2",
          "AutoencoderTiny"}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_batches_are_decoded_one_by_one_where_the_class_does(name):
    pipeline = pipeline_around(tiny_autoencoder(name))
    if name not in SLICES:
        with pytest.raises(ValueError, match=f"enable_vae_slicing: {name} decodes a batch at once"):
            pipeline.enable_vae_slicing()
        assert not getattr(pipeline.vae, "use_slicing", False)
        return
    sizes = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    whole = pictures(pipeline)
    pipeline.enable_vae_slicing()
    torch.testing.assert_close(pictures(pipeline), whole, **CLOSE)
    assert sizes == [2, 1, 1]
    pipeline.disable_vae_slicing()
    assert not pipeline.vae.use_slicing


def with_small_tiles(name):
    """An autoencoder with tiles of 32 pixels, and of 512 where the class takes no smaller ones."""
    if name == "AutoencoderTiny":
        return tiny_autoencoder(
            name, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
            num_decoder_blocks=(1,) * 4,
        )  # fmt: skip
    vae = tiny_autoencoder(name)
    if name == "AutoencoderDC":
        vae.enable_tiling(32, 32, 24, 24)
        vae.disable_tiling()
    return vae


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "height", "width"),
    [
        *[(name, *size) for name in ("AutoencoderKL", "AutoencoderDC") for size in ((36, 50), (16, 26), (30, 18))],
        *[("AutoencoderKLFlux2", *size) for size in ((18, 25), (8, 13), (15, 9))],
        ("AutoencoderTiny", 70, 66),
    ],
)
def test_pictures_in_tiles_are_near_the_whole_ones_at_any_size(name, height, width):
    vae = with_small_tiles(name)
    pipeline, space = pipeline_around(vae), latent_space(vae)
    latents = torch.randn(1, space.channels, height, width, generator=torch.Generator().manual_seed(0))
    calls = []
    vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    whole = decode_latents(vae, space, latents)
    pipeline.enable_vae_tiling()
    tiled = decode_latents(vae, space, latents)
    assert tiled.shape == whole.shape == (1, 3, height * space.factor, width * space.factor) and len(calls) > 2
    correlation = torch.corrcoef(torch.stack([tiled.flatten(), whole.flatten()]))[0, 1]
    assert correlation > 0.9
    pipeline.disable_vae_tiling()
    torch.testing.assert_close(decode_latents(vae, space, latents), whole)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("AutoencoderRAE", {}),
        ("AsymmetricAutoencoderKL", {}),
        ("ConsistencyDecoderVAE", {}),  # tiles when it encodes alone
        ("AutoencoderTiny", {}),  # takes a factor of 8 for granted
        # Two latent pixels a tile: the way to the next is 1, and more than 8 pixels of a tile are kept.
        ("AutoencoderKL", {"block_out_channels": (8,) * 5, "sample_size": 32, "down_block_types":
            ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}),
        ("AutoencoderKL", {"sample_size": (32, 32)}),
    ],
)  # fmt: skip
def test_tiles_that_would_not_make_the_picture_are_refused(name, overrides):
    pipeline = pipeline_around(tiny_autoencoder(name, **overrides))
    with pytest.raises(ValueError, match=f"enable_vae_tiling: this {name} decodes whole pictures only"):
        pipeline.enable_vae_tiling()
    assert not getattr(pipeline.vae, "use_tiling", False)


@pytest.mark.parametrize("name", CONFIGS)
def test_only_latents_of_one_scale_go_to_diffusers_own_pipeline(name):
    pipeline = pipeline_around(tiny_autoencoder(name))
    pipeline.transformer = tiny_model("DiT", in_channels=pipeline.latent_space.channels, timestep_freq_shift=1)
    reason = {"AutoencoderKL": "shift_factor=0.3", "AutoencoderKL per channel": "the VAE has latents_std"}
    with pytest.raises(ValueError, match=reason.get(name, f"the VAE is an {name}, not an AutoencoderKL")):
        pipeline.to_dit_pipeline()


def test_measured_statistics_do_not_go_to_diffusers_own_pipeline():
    vae = tiny_autoencoder("AutoencoderKL", shift_factor=None)
    model = tiny_model("DiT", timestep_freq_shift=1)
    pipeline = DEMOPipeline(model, dit_scheduler(), vae=vae, latent_space=measured(latent_space(vae)))
    with pytest.raises(ValueError, match="measured on digits, which DiTPipeline leaves out"):
        pipeline.to_dit_pipeline()


def test_variants_and_types_of_a_pipelines_autoencoder_are_loaded_as_asked(tmp_path):
    pipeline_around(tiny_autoencoder("AutoencoderKLFlux2")).save_pretrained(tmp_path, variant="fp16")
    loaded = DEMOPipeline.from_pretrained(tmp_path, variant="fp16", dtype={"vae": torch.bfloat16})
    assert isinstance(loaded.vae, AutoencoderKLFlux2) and not isinstance(loaded.vae, AutoencoderKL)
    assert loaded.vae.dtype == torch.bfloat16 and loaded.transformer.dtype == torch.float32
