"""The pages, in Gradio: fields, buttons, and which function of the other modules each calls."""

import html
import os
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image

from d_emo.common.commands import explanation
from d_emo.common.output import say
from d_emo.models.flops import count_parameters
from d_emo.pipelines.demo.classifying import TOP, classify
from d_emo.pipelines.demo.drawing import MOST_GUIDANCE, Moment, Studio, Wish, new_seed, strip
from d_emo.pipelines.demo.look import way_shown
from d_emo.pipelines.demo.opening import Source
from d_emo.pipelines.demo.results import write_archive
from d_emo.pipelines.demo.snippets import classifying_code, drawing_code, settings_shown

# Pictures below this many pixels are shown enlarged, with their pixels as squares.
SMALL_SIDE = 64
# Pixels of the field that a picture is dropped in.
PICTURE_HEIGHT = 280
# Seconds after which what was drawn for a download is deleted.
KEPT = 3600
# Visitors who may come in the same moment.
SLACK = 4
PRIVATE: dict[str, Any] = {"api_visibility": "private"}


class Stops:
    """The switch that ends a visitor's drawing, by session. A visitor has one drawing at a time.

    Attributes:
        refusals: why the last wish was refused, by session, until it is shown.
    """

    def __init__(self) -> None:
        self._switches: dict[str, threading.Event] = {}
        self.refusals: dict[str, str] = {}

    def new(self, request: gr.Request) -> None:
        """Make the switch of a drawing that is about to wait for its turn."""
        self._switches[_session(request)] = threading.Event()

    def of(self, request: gr.Request) -> threading.Event | None:
        """The switch of the visitor's drawing, if there is one, in progress or waiting."""
        return self._switches.get(_session(request))

    def press(self, request: gr.Request) -> None:
        """End the visitor's drawing, if there is one, and forget it."""
        if switch := self._switches.pop(_session(request), None):
            switch.set()


def drawing_page(studio: Studio, source: Source, waiting: int) -> gr.Blocks:
    """The page of a pipeline."""
    default, limits, stops = studio.default, studio.limits, Stops()
    small = ["small-pictures"] if max(studio.own_size) < SMALL_SIDE else []
    sizes = {f"{height} x {width}": (height, width) for height, width in studio.sizes}
    with gr.Blocks(title=f"{source.name} · d_emo", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown(f"# {source.name}\n{_described(studio)}")
        with gr.Row(elem_classes=["wish", "bar"]):
            label = gr.Dropdown(
                studio.classes,
                value=default.label,
                label="Class",
                info=f"{len(studio.classes):,} classes; type to search",
                visible=studio.conditional,
                elem_id="class",
                scale=4,
                min_width=280,
                num_choices_shown=max(1, len(studio.classes)),
            )
            draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=140)
            stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=140, interactive=False)
        status = gr.HTML(_said("Press Draw, or Enter in a field."), elem_id="status", elem_classes=["status"])
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                grid = gr.Gallery(
                    label="Pictures", show_label=False, columns=4, height="auto", object_fit="contain", format="png",
                    interactive=False, elem_id="grid", elem_classes=small,
                )  # fmt: skip
                way = gr.HTML(visible=False, elem_id="way", elem_classes=small)
            with gr.Column(scale=2, min_width=280, elem_classes=["wish"]):
                count = _whole_slider(limits.images, default.count, "Images", "count")
                guidance = gr.Slider(
                    1,
                    MOST_GUIDANCE,
                    default.guidance,
                    step=0.1,
                    label="Guidance",
                    info="1 is none; more follows the class more closely, with less variety",
                    visible=studio.conditional,
                    elem_id="guidance",
                )
                steps = _whole_slider(limits.steps, default.steps, "Steps", "steps")
                with gr.Row(elem_classes=["bar"]):
                    seed = gr.Number(default.seed, label="Seed", elem_id="seed", min_width=120)
                    another = gr.Button("New seed", elem_id="new-seed", min_width=120)
                sampler = gr.Dropdown(
                    studio.sampler_choices,
                    value=default.sampler,
                    label="Sampler",
                    info=f"its own is {type(studio.pipeline.scheduler).__name__}",
                    elem_id="sampler",
                )
                size = gr.Dropdown(
                    list(sizes),
                    value=f"{default.height} x {default.width}",
                    label="Size",
                    info="the model was trained on {} x {}".format(*studio.own_size),
                    visible=len(sizes) > 1,
                    elem_id="size",
                )
        archive = gr.DownloadButton("Download all (.zip)", visible=False, elem_id="archive")
        code = gr.Code(
            language="python", label="Draws the same", interactive=False, visible=False, wrap_lines=True,
            show_line_numbers=False, elem_id="code",
        )  # fmt: skip
        with gr.Accordion("All settings", open=False, visible=False) as more:
            used = gr.JSON(label="Settings", show_label=False, elem_id="settings")

        def wish(
            label: int | None, count: int, guidance: float, steps: int, seed: int, sampler: str, size: str
        ) -> Wish:
            height, width = sizes.get(size, studio.own_size)
            return studio.checked(
                Wish(label=label, count=count, guidance=guidance, steps=steps, sampler=sampler, seed=seed,
                     height=height, width=width)
            )  # fmt: skip

        shown = [status, draw, stop, grid, way, archive, code, used, more]
        results = len(shown) - 3

        def buttons(busy: bool) -> tuple[Any, Any]:
            return gr.update(interactive=not busy), gr.update(interactive=busy)

        def begin(request: gr.Request, *fields: Any) -> tuple[Any, ...]:
            """Refuse at once what cannot be drawn; else clear the page."""
            stops.press(request)
            try:
                wish(*fields)
                # Of Gradio's own limit a visitor would read "Error", and the page would go on waiting.
                if (many := len(page._queue)) >= waiting:
                    raise ValueError(f"As many as may wait are in the queue already: {many}. Try again soon.")
            except Exception as error:
                stops.refusals[_session(request)] = _wrong(error)
                raise gr.Error(visible=False, print_exception=False) from error  # nothing is queued; `refuse` shows it
            stops.new(request)
            hidden = gr.update(visible=False)
            return (_said("Waits for its turn."), *buttons(busy=True), [], hidden, hidden, hidden, None, hidden)

        def work(request: gr.Request, *fields: Any) -> Iterator[tuple[Any, ...]]:
            """Draw, in its turn."""
            switch = stops.of(request)
            if switch is None:  # the visitor left, or came back
                yield tuple([gr.skip()] * len(shown))
                return
            try:
                yield from follow(wish(*fields), switch)
            except Exception as error:
                yield (_wrong(error), *buttons(busy=False), *[gr.skip()] * results)
            finally:
                stops.press(request)

        def follow(wanted: Wish, switch: threading.Event) -> Iterator[tuple[Any, ...]]:
            if switch.is_set():
                yield (_said("Stopped before it began."), *buttons(busy=False), *[gr.skip()] * results)
                return
            seen: list[tuple[int, PIL.Image.Image]] = []
            for moment in studio.draw(wanted, switch):
                if not moment.images:
                    yield (_said(_progress(moment)), *buttons(busy=True), *[gr.skip()] * results)
                    continue
                seen.append((moment.step, moment.images[0]))
                told = (_said(_progress(moment)), *buttons(busy=not moment.done))
                pictures = (moment.images, gr.update(value=way_shown(seen), visible=True))
                if not moment.done:
                    yield (*told, *pictures, *[gr.skip()] * 4)
                    continue
                text, settings = drawing_code(studio, source, wanted), settings_shown(moment.settings)
                path = _new_file(f"{studio.about(wanted)}.zip")
                write_archive(path, moment.images, strip(seen), settings, text)
                file = gr.update(value=str(path), visible=True)
                yield (*told, *pictures, file, gr.update(value=text, visible=True), settings, gr.update(visible=True))

        def refuse(request: gr.Request) -> tuple[Any, ...]:
            stops.press(request)
            # What Gradio itself refuses, a field out of its range, comes to none of our functions.
            out_of_range = _wrong(ValueError("A field is empty, or out of its range."))
            return (stops.refusals.pop(_session(request), out_of_range), *buttons(busy=False))

        def end(request: gr.Request) -> str:
            if switch := stops.of(request):
                switch.set()
            return _said("Stopping after the step in progress.")

        fields = [label, count, guidance, steps, seed, sampler, size]
        started = draw.click(begin, fields, shown, queue=False, show_progress="hidden", **PRIVATE)
        started.success(
            work, fields, shown, concurrency_limit=1, show_progress="minimal", show_progress_on=status, **PRIVATE
        )
        started.failure(refuse, None, [status, draw, stop], queue=False, **PRIVATE)
        stop.click(end, None, status, queue=False, show_progress="hidden", **PRIVATE)
        another.click(new_seed, None, seed, queue=False, show_progress="hidden", **PRIVATE)
        page.unload(stops.press)
    return page.queue(max_size=waiting + SLACK, default_concurrency_limit=1, api_open=False)


def classifying_page(classifier: Any, source: Source, waiting: int) -> gr.Blocks:
    """The page of a classifier."""
    config = classifier.model.config
    with gr.Blocks(title=f"{source.name} · d_emo", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        parameters = count_parameters(classifier.model)
        gr.Markdown(
            f"# {source.name}\n{type(classifier.model).__name__}, {parameters:,} parameters, "
            f"{len(config.id2label):,} classes"
        )
        with gr.Row():
            with gr.Column(min_width=280):
                picture: Any = gr.Image(
                    sources=["upload", "clipboard"], label="Picture", height=PICTURE_HEIGHT, elem_id="picture"
                )
                # Gradio would open the file, and say in its own words what is wrong with it.
                picture.preprocess = lambda dropped: dropped and dropped.path
            with gr.Column(min_width=280):
                status = gr.HTML(_said("Drop a picture in."), elem_id="status", elem_classes=["status"])
                answer = gr.Label(label=f"The {TOP} likeliest classes", num_top_classes=TOP, elem_id="answer")
                with gr.Accordion("Code", open=False):
                    gr.Code(classifying_code(source), language="python", interactive=False, elem_id="code")

        def look(given: str | None) -> tuple[Any, ...]:
            if given is None:
                return _said("Drop a picture in."), None
            try:
                (width, height), answers = classify(classifier, given)
                return _said(f"{width} x {height} pixels"), answers
            except Exception as error:
                return _wrong(error), None

        picture.change(look, picture, [status, answer], concurrency_limit=1, show_progress_on=status, **PRIVATE)
    return page.queue(max_size=waiting + SLACK, default_concurrency_limit=1, api_open=False)


def _whole_slider(most: int, value: int, label: str, name: str) -> gr.Slider:
    """A slider from 1 on; Gradio has none of one value, so that this one is out of sight."""
    return gr.Slider(1, max(2, most), value, step=1, label=label, elem_id=name, visible=most > 1)


def _described(studio: Studio) -> str:
    pipeline = studio.pipeline
    network, height, width = pipeline.transformer, *studio.own_size
    device, dtype = network.device, str(network.dtype).removeprefix("torch.")
    return (
        f"{type(network).__name__}, {count_parameters(network):,} parameters, {height} x {width} pixels, "
        f"{dtype} on {device}"
    )


def _progress(moment: Moment) -> str:
    if moment.stopped:
        return f"Stopped after step {moment.step} of {moment.steps}: the pictures are unfinished."
    if moment.done:
        return f"Done, {moment.steps} steps."
    return f"Step {moment.step} of {moment.steps}: noise and picture mixed."


def _said(text: str) -> str:
    """A line that screen readers read out."""
    return f'<div role="status">{html.escape(text)}</div>'


def _wrong(error: Exception) -> str:
    """What went wrong: what a visitor can mend as one line; for the rest the terminal has the traceback."""
    line = explanation(error)
    if line is None:
        say("".join(traceback.format_exception(error)))
        line = f"This failed ({type(error).__name__}); the terminal where the page was started says where."
    return f'<div role="alert" class="wrong">{html.escape(line)}</div>'


def _new_file(name: str) -> Path:
    """A file in a folder of its own, where Gradio deletes it in time."""
    folder = tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR"))
    return Path(folder) / name.replace("/", "-").replace(", ", "-").replace(" ", "-")


def _session(request: gr.Request) -> str:
    return request.session_hash or ""
