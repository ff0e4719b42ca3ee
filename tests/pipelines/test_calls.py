"""Habits that people bring from Diffusers, and what a call refuses before it draws."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from helpers.models import tiny_model
from helpers.pipelines import dit_scheduler, images, tiny_pipeline, tiny_vae

from d_emo import DEMOPipeline, FlowMatchODESolverScheduler
from d_emo.pipelines import open_pipeline

NAMES = {0: "tench, Tinca tinca", 1: "crane, bird", 2: "crane, machine"}


def saved_and_loaded(pipeline, folder):
    pipeline.save_pretrained(folder)
    return DEMOPipeline.from_pretrained(folder)


REBUILT = {
    "from_pipe": lambda pipe, _: DEMOPipeline.from_pipe(pipe),
    "from_pipe_with_a_scheduler": lambda pipe, _: DEMOPipeline.from_pipe(pipe, scheduler=dit_scheduler()),
    "components": lambda pipe, _: DEMOPipeline(**pipe.components),
    "parts": lambda pipe, _: DEMOPipeline(pipe.transformer, pipe.scheduler),
    "deepcopy": lambda pipe, _: copy.deepcopy(pipe),
    "saved": saved_and_loaded,
    "saved_twice": lambda pipe, folder: saved_and_loaded(saved_and_loaded(pipe, folder / "a"), folder / "b"),
    "loaded_with_a_part": lambda pipe, folder: DEMOPipeline.from_pretrained(
        saved_and_loaded(pipe, folder) and folder, transformer=pipe.transformer
    ),
}


@pytest.mark.parametrize("rebuild", REBUILT.values(), ids=REBUILT)
def test_names_survive_every_way_of_making_a_pipeline_of_another(rebuild, tmp_path):
    pipeline = tiny_pipeline()
    again = rebuild(pipeline, tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.id2label == NAMES and again.get_label_ids("tench") == [0]
    torch.testing.assert_close(images(again), images(pipeline))


@pytest.mark.parametrize("table", [NAMES, {str(key): name for key, name in NAMES.items()}, list(NAMES.values()),
                                   tuple(NAMES.values())], ids=["ints", "strings", "list", "tuple"])  # fmt: skip
def test_names_come_by_id_or_in_order(table, tmp_path):
    pipeline = DEMOPipeline(tiny_model(in_channels=3, num_classes=3), dit_scheduler(), id2label=table)
    assert pipeline.id2label == NAMES
    assert saved_and_loaded(pipeline, tmp_path).id2label == NAMES


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (["a", "b", "c", "d"], "names class 3, the model has classes 0 to 2"),
        ({"cat": 0}, "names are text.*the other way round"),
        ({0: None}, "names are text"),
        ({0: "a", "0": "b"}, "an id twice"),
        ("tench", "is a str; pass names by id"),
        ({1.5: "a", 7: "b"}, "id2label"),
    ],
)
def test_names_that_do_not_fit_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        DEMOPipeline(tiny_model(in_channels=3, num_classes=3), dit_scheduler(), id2label=table)


def test_from_pipe_leaves_the_type_of_the_shared_weights_alone():
    pipeline = tiny_pipeline()
    pipeline.transformer.patch_embed.to(torch.float64)
    DEMOPipeline.from_pipe(pipeline)
    assert pipeline.transformer.patch_embed.weight.dtype == torch.float64
    DEMOPipeline.from_pipe(pipeline, dtype=torch.float32)
    assert pipeline.transformer.patch_embed.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"takes no \['id2labels'\]"):
        DEMOPipeline.from_pipe(pipeline, id2labels={})


def test_networks_of_others_are_refused_by_name():
    other = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8
    )
    with pytest.raises(ValueError, match=r"transformer is a DiTTransformer2DModel.*train/convert_dit.py"):
        DEMOPipeline(other, dit_scheduler())
    with pytest.raises(ValueError, match=r"transformer is a DataParallel.*unwrap_model"):
        DEMOPipeline(torch.nn.DataParallel(tiny_model()), dit_scheduler())
    with pytest.raises(ValueError, match="transformer is a Linear"):
        DEMOPipeline(torch.nn.Linear(2, 2), dit_scheduler())
    with pytest.raises(ValueError, match="transformer is a NoneType"):
        DEMOPipeline(None, dit_scheduler())


class Stop(PipelineCallback):
    """Stops after its second step."""

    tensor_inputs = ["latents"]  # type: ignore[assignment]  # as Diffusers documents it

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        pipeline._interrupt = step_index == 1
        return callback_kwargs


@pytest.mark.parametrize("several", [False, True])
def test_interrupting_ends_a_call_and_the_next_one_is_whole(several):
    pipeline = tiny_pipeline(flow=True)
    asked, kept = [], []
    pipeline.transformer.register_forward_pre_hook(lambda *_: asked.append(1))
    whole = images(pipeline)
    assert len(asked) == 4
    images(pipeline, callback_on_step_end=lambda _, step, time, tensors: kept.append(tensors["latents"]))
    asked.clear()
    stop = MultiPipelineCallbacks([Stop(), Stop()]) if several else Stop()
    stopped = images(pipeline, callback_on_step_end=stop)
    assert len(asked) == 2 and pipeline.interrupt
    torch.testing.assert_close(stopped, kept[1], atol=0, rtol=0)
    torch.testing.assert_close(images(pipeline), whole, atol=0, rtol=0)
    assert not pipeline.interrupt


def test_a_callback_turns_guidance_off_as_in_diffusers():
    pipeline = tiny_pipeline(flow=True)
    batches = []
    pipeline.transformer.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))

    def cut(pipe, step, timestep, tensors):
        assert pipe.num_timesteps == 4 and pipe.guidance_scale in (2.0, 0.0)
        if step == int(pipe.num_timesteps * 0.4):
            pipe._guidance_scale = 0.0
        return tensors

    images(pipeline, guidance_scale=2.0, callback_on_step_end=cut)
    assert batches == [4, 4, 2, 2]


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda *_: torch.zeros(2, 3, 16, 16), "answered with a Tensor"),
        (lambda *_: {"latents": torch.zeros(1)}, r"answered with latents \(1,\)"),
        (lambda *_: {"latents": None}, "answered with latents NoneType"),
        (SDCFGCutoffCallback(cutoff_step_ratio=0.4), r"has \['prompt_embeds'\]"),
        ("print", "cannot be called"),
    ],
)
def test_callbacks_that_cannot_work_are_refused(callback, message):
    with pytest.raises(ValueError, match=message):
        images(tiny_pipeline(), callback_on_step_end=callback)


NAN = float("nan")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": float("inf")}, "guidance_scale=inf is not a number from 1 to 1000 .1.0 turns"),
        ({"guidance_scale": "2"}, "guidance_scale='2' is not a"),
        ({"guidance_scale": torch.tensor(2.0)}, "guidance_scale=tensor.* is not a"),
        ({"guidance_scale": True}, "guidance_scale=True is not a"),
        ({"guidance_scale": None}, "guidance_scale=None"),
        ({"guidance_interval": (0.0, NAN)}, "guidance_interval=nan"),
        ({"guidance_interval": "01"}, "guidance_interval='01'"),
        ({"guidance_interval": 0.5}, "guidance_interval=0.5 is not"),
        ({"guidance_interval": None}, "guidance_interval=None is not"),
        ({"guidance_interval": (0, 0.5, 1)}, "guidance_interval="),
        ({"guidance_channels": 1.5}, "guidance_channels=1.5 is not a"),
        ({"guidance_channels": 0}, "guidance_channels=0 is not a whole number from 1 to"),
        ({"num_inference_steps": 10.0}, "num_inference_steps=10.0 is not a"),
        ({"num_inference_steps": -1}, "num_inference_steps=-1 is not a whole number from 1"),
        ({"num_inference_steps": True}, "num_inference_steps=True is not a"),
        ({"num_inference_steps": "10"}, "num_inference_steps='10' is not a"),
        ({"num_inference_steps": 10**9}, "num_inference_steps=1000000000 is not a whole number from 1 to 1000 .DDPM"),
        ({"num_images_per_label": 2.0}, "num_images_per_label=2.0 is not a"),
        ({"num_images_per_label": True}, "num_images_per_label=True"),
        ({"height": 16.0}, "height=16.0 is not a whole number from 1 on .leave it out for 16 pixels"),
        ({"width": "16"}, "width='16' is not a"),
        ({"width": -2}, "width=-2 is not"),
        ({"eta": NAN}, "eta=nan"),
        ({"eta": 1.5}, "eta=1.5 is not a number from 0 to 1"),
        ({"eta": "0"}, "eta='0' is not a"),
        ({"output_type": None}, "output_type=None is not one of"),
        ({"output_type": ["pil"]}, "output_type="),
        ({"generator": 42}, r"generator=42 is a int; pass torch.Generator\(\).manual_seed\(42\)"),
        ({"generator": [42]}, r"manual_seed\(42\)"),
        ({"generator": np.random.default_rng(0)}, r"is a Generator; pass torch.Generator\(\)"),
        ({"generator": "0"}, "generator='0' is a str"),
        ({"generator": []}, "0 generators for 1 images"),
        ({"latents": np.zeros((1, 3, 16, 16))}, r"latents are a ndarray; pass torch.from_numpy"),
        ({"latents": torch.zeros(1, 3, 16, 16, dtype=torch.long)}, "latents are torch.int64"),
        ({"latents": torch.full((1, 3, 16, 16), NAN)}, "latents hold NaN"),
        ({"latents": torch.zeros(3, 16, 16)}, "latents have the shape"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "is no list of names"),
        ({"callback_on_step_end_tensor_inputs": None}, "is no list of names"),
        ({"guidance_scale": 10**400}, "guidance_scale=1000.* is not a number from 1"),
        ({"guidance_scale": 1e300}, r"guidance_scale=1e\+300 is not a number from 1 to 1000"),
        ({"num_images_per_label": 10**9}, "num_images_per_label=1000000000 is not a whole number from 1 to 1000000"),
        ({"num_images_per_label": 0}, "num_images_per_label=0 is not"),
        ({"height": 10**9, "width": 10**9}, "height, width and the number of images ask for latents"),
        ({"height": NAN}, "height=nan is not a"),
        ({"height": 0}, "height=0 is not"),
        ({"eta": 0.5}, "eta=0.5: DDPMScheduler has no share of noise to set; use DDIMScheduler"),
        ({"eta": torch.tensor(0.5)}, "eta=tensor"),
        ({"return_dict": None}, "return_dict=None is not True or False"),
        ({"return_dict": "no"}, "return_dict='no' is not"),
        ({"latents": torch.zeros(1, 3, 16, 16, device="meta")}, "latents are torch.strided on meta"),
        ({"latents": torch.zeros(1, 3, 16, 16).to_sparse()}, "latents are torch.sparse_coo"),
        ({"latents": torch.zeros(1, 3, 16, 16, dtype=torch.complex64)}, "latents are torch.complex64"),
        ({"latents": [[0.0]]}, "latents are a list"),
        ({"generator": True}, "generator=True is a bool"),
        ({"guidance_channels": 10**9}, "guidance_channels=1000000000 is not"),
        ({"guidance_channels": True}, "guidance_channels=True is not a"),
        ({"guidance_interval": (1.0, 0.0)}, r"guidance_interval=\(1.0, 0.0\) is not"),
        ({"guidance_interval": ()}, r"guidance_interval=\(\) is not"),
        ({"output_type": 3}, "output_type=3 is not one of"),
        ({"callback_on_step_end_tensor_inputs": [1]}, "has \\['1'\\]"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": ""}, "label ''"),
        ({"class_labels": 3}, "label 3 is out of range; this model has classes 0 to 2"),
        ({"class_labels": -1}, "label -1 is out of range"),
        ({"class_labels": torch.tensor([0, 9])}, "label 9 is out of range"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_before_anything_is(arguments, message):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**{"class_labels": 0, "num_inference_steps": 2, "generator": generator, **arguments})
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    "label", [1.0, None, [1.5], torch.tensor([1.0]), [torch.tensor(1.5)], {"a": 1}, b"tench", [[1]]]
)
def test_labels_of_other_kinds_are_named(label):
    with pytest.raises((TypeError, ValueError), match="label"):
        tiny_pipeline()(label, num_inference_steps=2)


@pytest.mark.parametrize("label", [[[0] * 1000], [(0, 1)], [{0}], [{"a": 1}], (0, [1]), torch.zeros(2, 1).long()])
def test_nested_labels_are_named_in_a_short_line(label):
    with pytest.raises(TypeError, match=r"class_labels holds a (list|tuple|set|dict); .*one flat list") as refusal:
        tiny_pipeline()(label, num_inference_steps=2)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("num_images_per_prompt", "takes no num_images_per_prompt; here it is num_images_per_label"),
        ("prompt", "here it is class_labels"),
        ("seed", r"here it is generator \(torch.Generator"),
        ("guidance", "here it is guide or guidance_scale"),
        ("num_inference_step", "here it is num_inference_steps"),
        ("strength", "its arguments are class_labels, num_inference_steps"),
    ],
)
def test_arguments_of_other_pipelines_are_named_with_ours(name, message):
    with pytest.raises(TypeError, match=message):
        tiny_pipeline()(0, **{name: 1})


def test_the_decoders_switches_are_where_other_pipelines_have_them():
    pipeline = DEMOPipeline(tiny_model(num_classes=3), dit_scheduler(), vae=tiny_vae())
    whole = images(pipeline, output_type="pt")
    for part in ("slicing", "tiling"):
        getattr(pipeline, f"enable_vae_{part}")()
        assert getattr(pipeline.vae, f"use_{part}")
        torch.testing.assert_close(images(pipeline, output_type="pt"), whole, atol=1e-5, rtol=1e-5)
        getattr(pipeline, f"disable_vae_{part}")()
        assert not getattr(pipeline.vae, f"use_{part}")
    with pytest.raises(ValueError, match="enable_vae_slicing: this pipeline draws pixels"):
        tiny_pipeline().enable_vae_slicing()


def test_numbers_of_numpy_and_torch_are_numbers():
    pipeline = tiny_pipeline()
    plain = images(pipeline, (0, 1), guidance_scale=2.0, num_inference_steps=3)
    other = images(
        pipeline, (np.int64(0), torch.tensor(1)), guidance_scale=np.float32(2.0), num_inference_steps=np.int32(3)
    )
    torch.testing.assert_close(other, plain, atol=0, rtol=0)
    generators = tuple(torch.Generator().manual_seed(i) for i in range(2))
    torch.testing.assert_close(images(pipeline, generator=generators), images(pipeline), atol=0, rtol=0)


@pytest.mark.parametrize("flow", [False, True])
def test_a_step_that_ends_in_nan_is_named_with_its_cause(flow):
    pipeline = tiny_pipeline(flow)

    def spoil(_, step, timestep, tensors):
        return {"latents": tensors["latents"] * (NAN if step == 2 else 1)}

    with pytest.raises(ValueError, match=r"step 3 of 4 ended in NaN or infinity; likely (DDPM|FlowMatch)"):
        images(pipeline, callback_on_step_end=spoil)
    pipeline.transformer.proj_out.bias.data[0] = NAN
    with pytest.raises(ValueError, match=r"step 1 of 4 .*the transformer's weights hold NaN"):
        images(pipeline)


def test_nan_in_an_ode_solver_and_in_the_decoder_are_named():
    pipeline = tiny_pipeline(flow=True)
    pipeline.scheduler = FlowMatchODESolverScheduler(method="euler")
    pipeline.transformer.proj_out.bias.data[0] = NAN
    with pytest.raises(ValueError, match="weights hold NaN"):
        images(pipeline)
    vae = tiny_vae()
    vae.decoder.conv_out.bias.data[0] = float("inf")
    pipeline = DEMOPipeline(tiny_model(num_classes=3), dit_scheduler(), vae=vae)
    with pytest.raises(ValueError, match="decoded finite latents to NaN or infinity"):
        images(pipeline, output_type="pt")


def test_a_folder_that_does_not_load_says_why(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "a")
    weights = tmp_path / "a" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="a: this pipeline does not load"):
        open_pipeline(str(tmp_path / "a"))


def test_swapping_the_scheduler_in_keeps_its_settings():
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert pipeline(0, num_inference_steps=3, output_type="latent").settings["scheduler"] == "DDIMScheduler"
