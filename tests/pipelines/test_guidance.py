"""Guidance in all its forms against independent restatements; what is refused, counted, and left behind by a call."""

import json

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
)
from helpers.pipelines import images, tiny_pipeline, tiny_vae

from d_emo import DEMOPipeline, FlowMatchODESolverScheduler
from d_emo.pipelines.guidance import GUIDERS, REFUSED

# What the tiny models predict, and how many channels are guided.
KINDS = {
    "velocity": {"flow": True},
    "data": {"flow": True, "prediction_type": "sample"},
    "noise": {},
}
SCALE, STEPS = 3.0, 8


def recorded(pipeline, **arguments):
    """(sample, timestep, what the scheduler took) of every step of a call."""
    original, found = pipeline.scheduler.step, []

    def step(prediction, timestep, sample, **more):
        found.append((sample.clone(), timestep, prediction.clone()))
        return original(prediction, timestep, sample, **more)

    pipeline.scheduler.step = step
    try:
        images(pipeline, **{"num_inference_steps": STEPS, "guidance_scale": SCALE, **arguments})
    finally:
        del pipeline.scheduler.step
    return found


@torch.no_grad()
def taken(pipeline, sample, timestep, labels, head=0):
    """What the scheduler would take of the network's own answer, or of its second head's."""
    model = pipeline.transformer
    answer = model(sample, timestep.expand(len(sample)), torch.tensor(labels), return_dict=False)[head]
    if model.config.prediction_type == "sample":
        return (sample - answer) / max(float(timestep) / 1000, 0.05)
    return answer


def whole(tensor):
    """(N, values) in double precision."""
    return tensor.flatten(1).double()


def projected(difference, good, eta, limit):
    norm = difference.norm(dim=1, keepdim=True)
    difference = difference * torch.where(norm > limit, limit / norm, torch.ones_like(norm))
    along = (difference * good).sum(1, keepdim=True) / good.square().sum(1, keepdim=True) * good
    return difference - along + eta * along


class Restated:
    """Each guider's formula, of double-precision predictions (N, values); keeps what it remembers."""

    def __init__(self):
        self.average, self.step = 0.0, -1

    def __call__(self, name, good, weak):
        self.step += 1
        self.average = good - weak - 0.5 * self.average
        plain = weak + SCALE * (good - weak)
        if name == "zero-star":
            share = (good * weak).sum(1, keepdim=True) / weak.square().sum(1, keepdim=True)
            return 0 * good if self.step == 0 else share * weak + SCALE * (good - share * weak)
        if name == "apg":
            return weak + SCALE * projected(self.average, good, 0.0, 15.0)
        if name == "apg-mix":
            late = weak + SCALE * projected(self.average, good, 0.0, 10.0)
            return late if self.step > 5 else plain
        if name == "tcfg":  # the part of the weak one along the direction in which both are largest together
            pair = torch.stack([good, weak], dim=1)
            _, vectors = torch.linalg.eigh(pair @ pair.transpose(1, 2))
            main = torch.nn.functional.normalize(vectors[:, None, :, -1] @ pair, dim=2)[:, 0]
            weak = (weak * main).sum(1, keepdim=True) * main
            return weak + SCALE * (good - weak)
        return plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GUIDERS)
def test_each_guider_equals_its_formula(name, kind):
    if (name, kind) == ("zero-star", "noise"):
        pytest.skip("refused: see below")
    pipeline, restated = tiny_pipeline(**KINDS[kind]), Restated()
    guided = 2 if kind == "noise" else 3
    tolerance = 2e-5 if name == "tcfg" else 1e-6  # its singular vectors are float32's
    steps = recorded(pipeline, guider=name, guidance_channels=guided)
    assert len(steps) == STEPS
    for sample, timestep, prediction in steps:
        good, weak = taken(pipeline, sample.repeat(2, 1, 1, 1), timestep, [0, 1, 3, 3]).chunk(2)
        expected = restated(name, whole(good[:, :guided]), whole(weak[:, :guided])).view_as(good[:, :guided])
        scale = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(prediction[:, :guided] / scale, (expected / scale).float(), atol=tolerance, rtol=0)
        # The channel that is not guided and the variance are those of the class, whatever the batch.
        torch.testing.assert_close(prediction[:, guided:], good[:, guided:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["velocity", "noise"])
def test_the_plain_guider_is_guidance_scale_bit_for_bit(kind):
    pipeline = tiny_pipeline(**KINDS[kind])
    own = images(pipeline, guidance_scale=SCALE)
    theirs = ClassifierFreeGuidance(guidance_scale=SCALE)
    original = ClassifierFreeGuidance(guidance_scale=SCALE - 1, use_original_formulation=True)
    assert torch.equal(images(pipeline, guider="cfg", guidance_scale=SCALE), own)
    assert torch.equal(images(pipeline, guider=theirs), own)
    torch.testing.assert_close(images(pipeline, guider=original), own, atol=1e-4, rtol=1e-4)
    assert (images(pipeline, guidance_scale=1.5) - own).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("more", "batches"),
    [
        ({"guider": ClassifierFreeGuidance(3.0, start=0.25, stop=0.75)}, [2, 4, 4, 2]),
        ({"guider": "apg", "guidance_interval": (0.25, 1.0)}, [2, 4, 4, 4]),
        ({"guider": AdaptiveProjectedGuidance(3.0, start=0.5), "guidance_interval": (0.0, 0.75)}, [2, 2, 4, 2]),
        ({"guider": "tcfg", "guidance_scale": 1.0}, [2, 2, 2, 2]),
    ],
)
def test_a_guider_acts_in_its_own_part_of_the_steps_and_in_the_calls_interval(more, batches):
    pipeline, seen = tiny_pipeline(flow=True), []
    pipeline.transformer.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    output = pipeline([0, 1], num_inference_steps=4, output_type="latent", **more)
    assert seen == batches and output.settings["network_evaluations"] == sum(batches) / 2


def test_nothing_of_a_call_stays_in_the_guider():
    pipeline = tiny_pipeline(flow=True)
    guider = AdaptiveProjectedGuidance(SCALE, adaptive_projected_guidance_momentum=-0.5, eta=0.0)
    first = images(pipeline, guider=guider)
    assert guider.momentum_buffer is None and guider._step is None
    pipeline(0, guider=guider, num_inference_steps=3, callback_on_step_end=stop_at_once, output_type="latent")
    assert torch.equal(images(pipeline, guider=guider), first)
    assert torch.equal(images(pipeline, guider="apg", guidance_scale=SCALE), first)
    assert (images(pipeline, guider="apg", guidance_scale=SCALE + 1) - first).abs().max() > 1e-4


def stop_at_once(pipeline, step, timestep, tensors):
    pipeline._interrupt = True
    return tensors


def test_a_callback_ends_the_guidance_of_a_guider_too():
    pipeline, seen = tiny_pipeline(flow=True), []
    pipeline.transformer.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))

    def cut(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0
        return tensors

    images(pipeline, guider="apg", guidance_scale=SCALE, callback_on_step_end=cut)
    assert seen == [4, 2, 2, 2]


@pytest.fixture
def weaker():
    """A pipeline of other weights and another size."""
    return lambda **more: tiny_pipeline(**{"flow": True, "hidden_size": 16, "num_layers": 1, **more})


@pytest.mark.parametrize("name", [None, "apg"])
@pytest.mark.parametrize("classes", [3, 0])
def test_autoguidance_steers_away_from_the_weaker_model_of_the_same_class(weaker, name, classes):
    pipeline, guide, restated = tiny_pipeline(flow=True, num_classes=classes), weaker(num_classes=classes), Restated()
    labels = [0, 1] if classes else [0, 0]
    more = {"labels": labels} if classes else {"labels": None, "num_images_per_label": 2}
    for sample, timestep, prediction in recorded(pipeline, guide=guide, guider=name, num_inference_steps=3, **more):
        good, weak = (taken(one, sample, timestep, labels) for one in (pipeline, guide))
        expected = restated(name, whole(good), whole(weak)).view_as(good).float()
        torch.testing.assert_close(prediction, expected, atol=1e-6, rtol=1e-6)
    said = pipeline(labels if classes else None, num_images_per_label=1, guide=guide, guidance_scale=2.0,
                    guidance_interval=(0.25, 0.75), num_inference_steps=4, output_type="latent").settings  # fmt: skip
    assert (said["network_evaluations"], said["guide_evaluations"]) == (4, 2)
    assert json.loads(json.dumps(said))["guide"] == "DEMOTransformer2DModel"


def test_a_guide_is_asked_in_eval_mode_and_left_as_it_was(weaker):
    pipeline, guide = tiny_pipeline(flow=True), weaker()
    quiet = images(pipeline, guide=guide)
    guide.transformer.train()
    before = {name: value.clone() for name, value in guide.transformer.named_buffers()}
    assert torch.equal(images(pipeline, guide=guide), quiet) and guide.transformer.training
    assert all(torch.equal(value, before[name]) for name, value in guide.transformer.named_buffers())


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        ({}, {"in_channels": 4}, "the weaker model has channels 4, not 3"),
        ({}, {"num_classes": 0}, "has classes 0, not 3"),
        ({}, {"prediction_type": "sample"}, "has prediction 'sample', not 'flow_prediction'"),
        ({}, {"flow_path": "gvp"}, "is of the path gvp, not linear"),
        ({"sample_size": 6}, {"sample_size": 8, "patch_size": 4}, "has patches of 4, which do not divide 6 x 6"),
    ],
)
def test_a_guide_of_another_kind_is_refused(weaker, own, other, message):
    with pytest.raises(ValueError, match=f"^guide: .*{message}.*; take an earlier checkpoint of the same run"):
        images(tiny_pipeline(flow=True, **own), guide=weaker(**other))


def test_a_guide_of_other_classes_latents_or_schedule_is_refused(weaker):
    pipeline, guide = tiny_pipeline(flow=True), weaker()
    guide.name_classes({0: "cat", 1: "dog", 2: "cow"})
    with pytest.raises(ValueError, match="has other class names"):
        images(pipeline, guide=guide)
    of_latents = tiny_pipeline(flow=True, in_channels=4)
    of_latents = DEMOPipeline(of_latents.transformer, of_latents.scheduler, tiny_vae(), of_latents.id2label)
    with pytest.raises(ValueError, match="the weaker model draws pixels"):
        images(of_latents, guide=weaker(in_channels=4))
    noise, other = tiny_pipeline(), tiny_pipeline(num_layers=1)
    other.trained_schedule = other.trained_schedule**2
    with pytest.raises(ValueError, match="was trained on another noise schedule"):
        images(noise, guide=other)
    with pytest.raises(ValueError, match="guide is the pipeline's own model, which steers nowhere"):
        images(pipeline, guide=DEMOPipeline.from_pipe(pipeline))


@pytest.mark.parametrize("kind", ["velocity", "noise"])
def test_internal_guidance_steers_both_predictions_away_from_the_second_head(kind):
    pipeline = tiny_pipeline(**KINDS[kind], guide_block=1)
    for sample, timestep, prediction in recorded(pipeline, internal_guidance=1.4, num_inference_steps=3):
        asked = (pipeline, sample.repeat(2, 1, 1, 1), timestep, [0, 1, 3, 3])
        full, base = (taken(*asked, head=head).double() for head in (0, 1))
        good, weak = (base + 1.4 * (full - base))[:, :3].chunk(2)
        torch.testing.assert_close(prediction[:, :3].double(), weak + SCALE * (good - weak), atol=1e-6, rtol=1e-6)
        assert torch.equal(prediction[:, 3:], full[:2, 3:].float())  # the variance
    alone = pipeline([0, 1], 3, guidance_scale=1.0, internal_guidance=1.4, output_type="latent").settings
    assert (alone["network_evaluations"], alone["guide_evaluations"], alone["internal_guidance"]) == (3, 0, 1.4)


def test_without_internal_guidance_the_second_head_changes_nothing():
    headed, plain = tiny_pipeline(flow=True, guide_block=1), tiny_pipeline(flow=True)
    plain.transformer.load_state_dict(
        {name: value for name, value in headed.transformer.state_dict().items() if not name.startswith("guide_")}
    )
    assert torch.equal(images(headed), images(plain))


def test_internal_guidance_needs_the_second_head_and_all_blocks():
    with pytest.raises(
        ValueError, match=r"internal_guidance=1.4: the model has no second .*; train one with --guide-b"
    ):
        images(tiny_pipeline(flow=True), internal_guidance=1.4)
    pipeline = tiny_pipeline(flow=True, guide_block=1)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(ValueError, match=r"internal_guidance=1.4: a cache is on.*disable_cache\(\)"):
        images(pipeline, internal_guidance=1.4)
    images(pipeline)  # guidance of other forms goes with caches
    pipeline.transformer.disable_cache()
    assert (images(pipeline, internal_guidance=1.4) - images(pipeline)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("guider", "message"),
    [
        ("cgf", "guider='cgf' is none of Diffusers' that fit here; did you mean cfg"),
        ("pag", "guider='pag' is none of Diffusers'"),
        (
            AutoGuidance(auto_guidance_layers=0, dropout=1.0),
            "guider is a AutoGuidance: it drops layers.*take guide=, a weaker",
        ),
        (PerturbedAttentionGuidance(perturbed_guidance_layers=0), "guider is a PerturbedAttentionGuidance: .* maps"),
        (7, "guider=7 is a int; pass one of cfg, zero-star"),
        (ClassifierFreeGuidance, "pass one of cfg, zero-star"),
        (ClassifierFreeGuidance(0.5), "guider's guidance_scale=0.5 is not a number from 1"),
        (ClassifierFreeGuidance(2.0), "guidance_scale=3.0: the guider has its own, 2; set it there"),
        *((name, f"guider='{name}': .*; take") for name in REFUSED if name != "LTX2Guidance"),
    ],
)
def test_other_guiders_are_refused_by_name(guider, message):
    with pytest.raises(ValueError, match=message):
        images(tiny_pipeline(flow=True), guider=guider, guidance_scale=3.0)


def test_guiders_that_do_not_fit_the_model_or_the_scheduler_are_refused():
    with pytest.raises(ValueError, match=r"begins with a velocity of zero, and the model predicts noise; .*steps=0"):
        images(tiny_pipeline(), guider="zero-star")
    assert images(tiny_pipeline(), guider=ClassifierFreeZeroStarGuidance(2.0, zero_init_steps=0)).isfinite().all()
    with pytest.raises(ValueError, match="nothing to steer from"):
        images(tiny_pipeline(flow=True, num_classes=0), None, guider="apg")
    pipeline = tiny_pipeline(flow=True)
    pipeline.scheduler = FlowMatchODESolverScheduler(method="heun2")
    with pytest.raises(ValueError, match="AdaptiveProjectedGuidance counts steps, and an ODE solver has none"):
        images(pipeline, guider="apg")


def test_settings_say_which_guider_drew():
    said = tiny_pipeline(flow=True)(0, 2, guider="apg", guidance_scale=4, output_type="latent").settings
    stored = json.loads(json.dumps(said))
    assert stored["guider"]["class"] == "AdaptiveProjectedGuidance" and stored["guider"]["eta"] == 0.0
    assert (stored["guidance_scale"], stored["guidance_channels"], stored["guide"]) == (4.0, 3, None)
