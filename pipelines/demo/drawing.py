"""What a visitor may ask of a pipeline, and the drawing of it, moment by moment."""

import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import PIL.Image
import torch

from d_emo.common.checks import number, one_of, whole
from d_emo.common.figures import caption_grid
from d_emo.images.latents import decode_latents
from d_emo.pipelines import DEMOPipeline
from d_emo.pipelines.checks import check_scheduler, default_steps, takes_guidance
from d_emo.pipelines.samplers import fitting_samplers, image_generator, make_scheduler, own_shift

# The sampler that was saved with the model.
OWN = "own"
SAMPLER_NAMES = {
    OWN: "the model's own",
    "ddpm": "DDPM (ancestral)",
    "ddim": "DDIM",
    "euler": "Euler",
    "heun": "Heun (asks twice a step)",
    "sde": "Euler-Maruyama (stochastic)",
    "sde-heun": "Heun (stochastic)",
    "flow-map": "jumps of a flow map",
}
# Pictures of the way from noise that are shown, evenly spread over the steps, the last among them.
MOMENTS = 8
# Sizes that are offered, as parts of the model's own; others than that are what it was not trained for.
SIDES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
# Guidance up to this suffices for a slider; published scores use 1 to 7.
MOST_GUIDANCE, USUAL_GUIDANCE = 10.0, 1.5
LARGEST_SEED = 2**32 - 1
FEW_IMAGES = 8
# Seconds between two notes on progress that come without pictures.
PACE = 0.3


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a visitor may ask for at most; `side` in pixels, None for twice the model's own."""

    images: int = 16
    steps: int = 250
    side: int | None = None


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be drawn.

    Attributes:
        label: class id; None for an unconditional model.
        count: images of it.
        guidance: scale of classifier-free guidance, 1 is none.
        steps: of the sampler.
        sampler: "own", or a name of `pipelines.samplers`.
        seed: image i is a function of (seed, i), as in `d-emo sample`.
        height, width: in pixels.
    """

    label: int | None
    count: int
    guidance: float
    steps: int
    sampler: str
    seed: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Moment:
    """How far a drawing is.

    Attributes:
        step, steps: steps done, and all of them.
        images: the pictures as they are: noisy until the last step. None where nothing is to be shown anew.
        done: whether nothing comes after.
        stopped: whether it was ended before its last step.
        settings: of the pipeline's call, once done.
    """

    step: int
    steps: int
    images: list[PIL.Image.Image] | None = None
    done: bool = False
    stopped: bool = False
    settings: dict[str, Any] | None = None


class Studio:
    """A pipeline and what may be asked of it.

    Args:
        pipeline: that draws.
        limits: of what visitors ask.
    """

    def __init__(self, pipeline: DEMOPipeline, limits: Limits | None = None):
        self.pipeline, self.limits = pipeline, limits or Limits()
        pipeline.set_progress_bar_config(disable=True)

    @property
    def conditional(self) -> bool:
        """Whether the model has classes."""
        return bool(self.pipeline.transformer.config.num_classes)

    @cached_property
    def classes(self) -> list[tuple[str, int]]:
        """Name and id of every class, in the order of the names; "class 7" where the model has none for it."""
        named = self.pipeline.id2label
        count = self.pipeline.transformer.config.num_classes
        if not named:
            return [(f"class {label}", label) for label in range(count)]
        shown = [(named.get(label, f"class {label}"), label) for label in range(count)]
        return sorted(shown, key=lambda entry: (entry[0].casefold(), entry[1])) if count > FEW_IMAGES * 4 else shown

    @cached_property
    def samplers(self) -> dict[str, Any]:
        """Schedulers by name that fit the model and go step by step, its own first."""
        config, own = self.pipeline.transformer.config, self.pipeline.scheduler
        shift = own_shift(own)
        candidates = {OWN: own, **{name: make_scheduler(name, config, shift) for name in fitting_samplers(config)}}
        return {name: scheduler for name, scheduler in candidates.items() if self._fits(scheduler)}

    def _fits(self, scheduler: Any) -> bool:
        if not hasattr(scheduler, "step"):  # a solver that takes the whole way at once shows no way
            return False
        try:
            check_scheduler(scheduler, self.pipeline.transformer.config, self.pipeline.trained_schedule)
            DEMOPipeline.from_pipe(self.pipeline, scheduler=scheduler).check_steps(default_steps(scheduler))
        except ValueError:
            return False
        return True

    @property
    def sampler_choices(self) -> list[tuple[str, str]]:
        """The samplers for people, and their names."""
        return [(SAMPLER_NAMES[name], name) for name in self.samplers]

    @cached_property
    def own_size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was configured for."""
        height, width = self.pipeline.transformer.sample_shape
        return height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Heights and widths that the model can draw and the limit lets, in the same ratio as its own, which is one."""
        space = self.pipeline.latent_space
        if space is not None and space.output_size is not None:
            return [self.own_size]
        step = self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size
        limit = self.limits.side or 2 * max(self.own_size)
        found = {self.own_size}
        for part in SIDES:
            height, width = (int(side * part) for side in self.own_size)
            if not height % step and not width % step and min(height, width) and max(height, width) <= limit:
                found.add((height, width))
        return sorted(found)

    @property
    def default(self) -> Wish:
        """What the page begins with."""
        height, width = self.own_size
        sampler = next(iter(self.samplers))
        saved = self.pipeline.config.default_num_inference_steps
        steps = saved if sampler == OWN and saved else default_steps(self.samplers[sampler])
        return Wish(
            label=self.classes[0][1] if self.conditional else None,
            count=min(FEW_IMAGES, self.limits.images),
            guidance=USUAL_GUIDANCE if takes_guidance(self.pipeline.transformer.config) else 1.0,
            steps=min(steps, self.limits.steps),
            sampler=sampler,
            seed=0,
            height=height,
            width=width,
        )

    def checked(self, wish: Wish) -> Wish:
        """The wish as Python's own numbers.

        Raises:
            ValueError: a value is out of range or over a limit; the message says what is allowed.
        """
        sizes = ", ".join(f"{height} x {width}" for height, width in self.sizes)
        if self.conditional:
            classes = self.pipeline.transformer.config.num_classes
            whole(wish.label, "class", 0, classes - 1, "choose one of the list")
        taken = replace(
            wish,
            label=wish.label if self.conditional else None,
            count=whole(wish.count, "images", 1, self.limits.images, "this page draws no more at once"),
            guidance=number(wish.guidance, "guidance", 1, MOST_GUIDANCE, "1 is none") if self.conditional else 1.0,
            steps=whole(wish.steps, "steps", 1, self.limits.steps, "this page takes no more"),
            sampler=one_of(wish.sampler, "sampler", self.samplers),
            seed=whole(wish.seed, "seed", 0, LARGEST_SEED, "any whole number will do"),
        )
        if (taken.height, taken.width) not in self.sizes:
            raise ValueError(f"size={taken.height} x {taken.width} is none of this page's: {sizes}.")
        return taken

    def about(self, wish: Wish) -> str:
        """The wish in a few words, for captions."""
        named = {label: name for name, label in self.classes}
        subject = named[wish.label] if wish.label is not None else "unconditional"
        return f"{subject.split(',')[0]}, seed {wish.seed}"

    def arguments(self, wish: Wish) -> dict[str, Any]:
        """Arguments of the pipeline's call, without the generators; sizes are left out where they are the model's."""
        own = (wish.height, wish.width) == self.own_size
        return {
            **({"class_labels": self._label(wish)} if self.conditional else {}),
            "num_inference_steps": wish.steps,
            **({"guidance_scale": wish.guidance} if self.conditional else {}),
            "num_images_per_label": wish.count,
            **({} if own else {"height": wish.height, "width": wish.width}),
        }

    def _label(self, wish: Wish) -> str | int:
        """The class's name where it says the class, for people who read the code; else the id."""
        name = self.pipeline.id2label.get(wish.label or 0)
        try:
            return name if name and self.pipeline.get_label_ids(name) == [wish.label] else int(wish.label or 0)
        except ValueError:  # several classes share the name
            return int(wish.label or 0)

    def draw(self, wish: Wish, stop: threading.Event) -> Iterator[Moment]:
        """Draw, and tell how far it is; the last moment is done.

        Args:
            wish: what is drawn.
            stop: set from elsewhere, ends the drawing after the step in progress. Closing the iterator does, too.

        Raises:
            ValueError: the wish is out of range, or the pipeline refuses it.
        """
        wish = self.checked(wish)
        pipeline = DEMOPipeline.from_pipe(self.pipeline, scheduler=self.samplers[wish.sampler])
        pipeline.set_progress_bar_config(disable=True)
        told: queue.Queue[Moment | BaseException] = queue.Queue()
        work = threading.Thread(target=_work, args=(pipeline, wish, self.arguments(wish), stop, told), daemon=True)
        work.start()
        try:
            while True:
                moment = told.get()
                if isinstance(moment, BaseException):
                    raise moment
                yield moment
                if moment.done:
                    return
        finally:
            stop.set()
            work.join()


def _work(
    pipeline: DEMOPipeline,
    wish: Wish,
    arguments: dict[str, Any],
    stop: threading.Event,
    told: "queue.Queue[Moment | BaseException]",
) -> None:
    """The drawing, in a thread of its own: what the pipeline tells by a callback becomes something to wait for."""
    last, done = time.monotonic(), 0

    def after_step(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        nonlocal last, done
        done, steps = step + 1, pipeline.num_timesteps
        if stop.is_set():
            pipeline._interrupt = True
        elif done in moments(steps)[:-1]:  # the last comes with the result
            told.put(Moment(step=done, steps=steps, images=preview(pipeline, tensors["latents"])))
            last = time.monotonic()
        elif time.monotonic() - last > PACE:
            told.put(Moment(step=done, steps=steps))
            last = time.monotonic()
        return {}

    try:
        generators = [image_generator(wish.seed, index) for index in range(wish.count)]
        output = pipeline(**arguments, generator=generators, callback_on_step_end=after_step)
        steps = pipeline.num_timesteps
        settings = {**output.settings, "seed": wish.seed}
        told.put(
            Moment(step=done, steps=steps, images=output.images, done=True, stopped=done < steps, settings=settings)
        )
    except BaseException as error:  # whoever waits has to know, whatever it is
        told.put(error)


def moments(steps: int) -> list[int]:
    """Numbers of done steps at which pictures are shown: the first, the last, and those evenly between."""
    count = min(MOMENTS, steps)
    return [1 + round(index * (steps - 1) / max(1, count - 1)) for index in range(count)] if count > 1 else [steps]


def preview(pipeline: DEMOPipeline, latents: torch.Tensor) -> list[PIL.Image.Image]:
    """Pictures of what the sampler holds (N, C, h, w): noise and picture mixed, no prediction of the end.

    A decoder that draws noise draws it from PyTorch's own generator, so that looking changes nothing.
    """
    space = pipeline.latent_space
    images = latents if space is None else decode_latents(pipeline.vae, space, latents, None)
    return pipeline.image_processor.postprocess(torch.nan_to_num(images), output_type="pil")


def strip(way: list[tuple[int, PIL.Image.Image]]) -> PIL.Image.Image:
    """The way of one image from noise as a row, each picture under its number of steps."""
    words = [f"step {step}" if place == 0 else str(step) for place, (step, _) in enumerate(way)]
    frames = [caption_grid([[image]], [word]) for word, (_, image) in zip(words, way, strict=True)]
    width, height = frames[0].size
    row = PIL.Image.new("RGB", (len(frames) * width, height), "white")
    for place, frame in enumerate(frames):
        row.paste(frame, (place * width, 0))
    return row


def new_seed() -> int:
    """A seed that nobody chose."""
    return random.SystemRandom().randint(0, LARGEST_SEED)
