"""Training a small network on pictures as fast as one GPU allows: data, noise and times on the device, and a whole step
as one CUDA graph.

Objective, average and samples are the trainer's (`--objective sit`: velocities on the linear path, times drawn evenly).
Shapes: B images of a batch, C x H x W.
"""

import copy
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from d_emo import DEMOPipeline, create_model
from d_emo.common.averaging import WeightAverage
from d_emo.common.figures import caption_grid, save_image
from d_emo.common.files import appended
from d_emo.common.messages import kind_and_line
from d_emo.common.output import say
from d_emo.eval.benchmarks.gpu.graphs import captured
from d_emo.eval.benchmarks.gpu.pictures import Pictures
from d_emo.eval.benchmarks.gpu.weights import (
    compact,
    load_into,
    read_groups,
    read_network_state,
    write_groups,
    write_network_state,
)
from d_emo.models.compiling import compile_network
from d_emo.train.diffusion.choose_objective import make_objective
from d_emo.train.diffusion.config import OptimizationOptions
from d_emo.train.diffusion.figures import draw_samples

LOSSES = "loss.csv"
COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "images_per_second", "seconds")
OPTIONS, MAX_NORM = OptimizationOptions(objective="sit"), 1.0
# The learning rate falls to 0 over the last part of the time.
COOLDOWN = 0.25
# Steps between two lines, which are the only waits for the GPU.
WINDOW, WINDOW_ON_CPU = 50, 2
# Of a training for a number of steps, however few.
LEAST_LINES = 20


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained.

    Attributes:
        model: its name.
        overrides: of its configuration.
        batch: images a step.
        learning_rate: after `warmup` steps.
        average_decay: of the averaged weights.
        cooldown: whether the learning rate falls to 0 at the end.
        seed: of the weights, and of all draws of the training, which are the same for every network.
        compile: whether blocks are compiled.
        change: of the fresh network, in place, before anything else is done with it.
    """

    model: str
    overrides: dict[str, Any] = field(default_factory=dict)
    batch: int = 256
    learning_rate: float = 5e-4
    warmup: int = 500
    average_decay: float = 0.9995
    cooldown: bool = False
    seed: int = 0
    compile: bool = False
    change: Callable[[Any], None] | None = None


class GraphTraining:
    """A network in training, in turns if others are trained beside it.

    Args:
        recipe: how; its model is that of `resume`, where that is given.
        pictures: on the device that is to be used.
        folder: gets loss.csv as it grows, and at the end weights, state and samples.
        resume: folder of an earlier run to go on from.
    """

    def __init__(self, recipe: Recipe, pictures: Pictures, folder: Path, resume: Path | None = None):
        self.pictures, self.folder = pictures, folder
        self.device = pictures.pixels.device
        self.cuda = self.device.type == "cuda"
        self.state: dict[str, Any] = {"step": 0, "images": 0, "runs": 0, "seconds": 0.0}
        groups = {}
        if resume:
            groups, self.state = read_groups(resume), read_network_state(resume)
            recipe = replace(recipe, model=self.state["model"], overrides=self.state["overrides"])
        self.recipe, self.objective = recipe, make_objective(OPTIONS)
        seed = recipe.seed + 1000 * self.state["runs"]
        torch.manual_seed(seed)
        self.model = self._network()
        self.average = WeightAverage(self.model, recipe.average_decay)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=torch.tensor(0.0, device=self.device),
            betas=(0.9, 0.99),
            weight_decay=0.0,
            capturable=self.cuda,
            fused=self.cuda,
            foreach=False,
        )
        self.first = self.step = int(self.state["step"])
        self.average.n_averaged.fill_(1 + self.step)
        self.with_moments = bool(groups) and self._restore(groups)
        self.loss_sum, self.norm_sum = (torch.zeros((), device=self.device) for _ in range(2))
        self.window, self.busy, self.failed = 0, 0.0, ""
        self.trained_seconds = float(self.state["seconds"])
        folder.mkdir(parents=True, exist_ok=True)
        self._begin_losses(resume)
        self.run: Callable[[], Any] = self._step
        if recipe.compile:
            compile_network(self.model, "blocks")  # not the average, which draws few samples
        if self.cuda:
            self._capture()
        torch.manual_seed(seed)  # after all that draws once a network: every network sees the same batches and noise
        self.draws = self._get_draws()

    def _network(self) -> Any:
        side, objective = self.pictures.pixels.shape[-1], self.objective
        with self.device:
            model = create_model(
                self.recipe.model,
                **{"sample_size": side, "in_channels": 3, "num_classes": max(1, len(self.pictures.id2label))},
                **{"learn_sigma": objective.learn_sigma, "prediction_type": objective.prediction_type},
                **{"flow_path": objective.flow_path},
                **self.recipe.overrides,
            )
            if self.recipe.change:
                self.recipe.change(model)
        return model.train()

    def _restore(self, groups: dict[str, dict[str, torch.Tensor]]) -> bool:
        """Take an earlier run's weights; whether the optimizer's moments were among them."""
        load_into(self.average.module, groups["ema"])
        load_into(self.model, groups.get("raw", groups["ema"]))
        if not {"m", "v"} <= set(groups):
            return False
        for name, parameter in self.trained.items():
            first, second = (groups[group][name].to(self.device, parameter.dtype) for group in ("m", "v"))
            step = torch.tensor(float(self.step), device=self.device)
            self.optimizer.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second.square()}
        return True

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _loss(self, network: Any) -> torch.Tensor:
        """A network's loss on pictures, noise and times that are drawn here."""
        batch, device = self.recipe.batch, self.device
        index = torch.randint(len(self.pictures.pixels), (batch,), device=device)
        data = self.pictures.pixels[index].float().div_(127.5).sub_(1.0)  # (B, C, H, W)
        data = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, data.flip(-1), data)
        dropped = torch.rand(batch, device=device) < OPTIONS.class_dropout_prob
        labels = torch.where(dropped, self.model.null_label, self.pictures.labels[index])  # (B,)
        noise, times = torch.randn_like(data), torch.rand(batch, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.cuda):
            return self.objective.losses(
                lambda *given: network(*given, return_dict=False)[0], data, labels, noise, times
            )["loss"].mean()

    def _step(self) -> None:
        """A step that waits for nothing; a CUDA graph can hold it."""
        loss = self._loss(self.model)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum.add_(loss.detach())
        self.norm_sum.add_(norm)

    def _capture(self) -> None:
        """Make the step a graph, if that works; what its first runs changed is undone."""
        kept = [copy.deepcopy(part.state_dict()) for part in (self.model, self.optimizer)]
        try:
            graph, _ = captured(self._step, warm_ups=3)
            self.run = graph.replay
            say("a step is one CUDA graph")
        except Exception as error:  # whatever cannot be captured on this machine
            say(f"no CUDA graph: {kind_and_line(error)}")
            torch.cuda.synchronize()
            self.optimizer.zero_grad(set_to_none=True)
        self._undo(*kept)
        self.loss_sum.zero_()
        self.norm_sum.zero_()

    @torch.no_grad()
    def _undo(self, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """Put values back where they are: a graph goes on using the same memory."""
        self.model.load_state_dict(model)
        places = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(places):
            for name, value in self.optimizer.state[parameter].items():
                before = optimizer["state"].get(number, {}).get(name)
                value.copy_(before if before is not None else torch.zeros_like(value))

    def _set_rate(self, done: float) -> None:
        """The learning rate of the next step; `done` is the share of the time that has passed."""
        since = self.step - (0 if self.with_moments else self.first)
        rate = self.recipe.learning_rate * min(1.0, (since + 1) / self.recipe.warmup)
        if self.recipe.cooldown:
            rate *= min(1.0, max(0.0, (1 - done) / COOLDOWN))
        self.optimizer.param_groups[0]["lr"].fill_(rate)

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, seconds: float, steps: int | None = None, done: float = 0.0, until: float = 1.0) -> None:
        """Train for some time, or so many steps if they are over before.

        Args:
            seconds, steps: how long; the learning rate goes by what has the larger part behind it.
            done, until: which part of all the training that is, for the cool-down.
        """
        self._set_draws(self.draws)
        began, first = time.monotonic(), self.step
        shown = began
        window = WINDOW if self.cuda else WINDOW_ON_CPU
        window = min(window, max(1, steps // LEAST_LINES)) if steps else window
        while (passed := time.monotonic() - began) < seconds and self.step - first != steps and not self.failed:
            share = max(passed / seconds, (self.step - first) / steps if steps else 0.0)
            self._set_rate(done + (until - done) * share)
            self.run()
            self.step += 1
            self.window += 1
            self.average.update_parameters(self.model)
            if self.window == window:
                loss = self.loss_sum.item()  # waits
                now = time.monotonic()
                self._write_line(loss, self.busy + now - shown)
                self.busy, shown = 0.0, now
        if self.cuda:
            torch.cuda.synchronize()
        self.busy += time.monotonic() - shown
        self.state["seconds"] += time.monotonic() - began
        self.draws = self._get_draws()

    def _write_line(self, loss_sum: float, seconds: float) -> None:
        loss, norm = loss_sum / self.window, self.norm_sum.item() / self.window
        rate = float(self.optimizer.param_groups[0]["lr"])
        speed = self.window * self.recipe.batch / seconds
        self.trained_seconds += seconds
        row = (
            self.step,
            round(loss, 5),
            round(norm, 4),
            round(rate, 7),
            round(speed, 1),
            round(self.trained_seconds, 2),
        )
        with appended(self.folder / LOSSES) as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        if self.step // self.window % 10 == 1:
            say(f"{self.recipe.model}: step {row[0]}, loss {row[1]}, norm {row[2]}, {row[4]} images/s")
        self.loss_sum.zero_()
        self.norm_sum.zero_()
        self.window = 0
        if loss != loss:
            self.failed = f"the loss is not a number at step {self.step}"

    def _begin_losses(self, resume: Path | None) -> None:
        """A new file of losses, which begins with those of the earlier run."""
        before = resume / LOSSES if resume else None
        lines = before.read_text(encoding="utf-8") if before and before.is_file() else ",".join(COLUMNS) + "\n"
        (self.folder / LOSSES).write_text(lines, encoding="utf-8")

    def _get_draws(self) -> torch.Tensor:
        return torch.cuda.get_rng_state(self.device) if self.cuda else torch.get_rng_state()

    def _set_draws(self, draws: torch.Tensor) -> None:
        if self.cuda:
            torch.cuda.set_rng_state(draws, self.device)
        else:
            torch.set_rng_state(draws)

    # ---- what is left ------------------------------------------------------------------------------------------------

    def save(self, budget: float = 38e6) -> list[str]:
        """Write the weights that fit into so many bytes, and the state; which groups were kept.

        Raises:
            ValueError: the training failed: its weights are of no use. Or the network was changed, of which state.json
                says nothing.
        """
        if self.recipe.change:
            raise ValueError(f"{self.recipe.model}: it was changed and could not be made again; nothing is saved.")
        if self.failed:
            raise ValueError(f"{self.recipe.model}: {self.failed}; nothing is saved.")
        groups = {"ema": compact(self.average.module.state_dict()), "raw": compact(self.model.state_dict())}
        moments = {name: self.optimizer.state[p] for name, p in self.trained.items() if p in self.optimizer.state}
        if moments:
            groups["m"] = {name: state["exp_avg"].bfloat16().cpu() for name, state in moments.items()}
            groups["v"] = {name: state["exp_avg_sq"].sqrt().bfloat16().cpu() for name, state in moments.items()}
        kept = write_groups(self.folder, groups, budget)
        if kept:
            images = self.state["images"] + (self.step - self.first) * self.recipe.batch
            now = {"step": self.step, "images": images, "runs": self.state["runs"] + 1, "kept": kept}
            recipe = {"model": self.recipe.model, "overrides": self.recipe.overrides}
            write_network_state(self.folder, self.state | now | recipe)
        return kept

    def pipeline(self) -> DEMOPipeline:
        """The averaged network with its sampler."""
        network: Any = self.average.module
        scheduler = self.objective.make_scheduler()
        pipeline = DEMOPipeline(transformer=network, scheduler=scheduler, id2label=self.pictures.id2label)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def average_loss(self, batches: int) -> float:
        """The loss of the averaged network as it draws samples, with BatchNorm's running statistics.

        Pictures, noise and times are the same for all networks, whatever the seed of their training.
        """
        torch.manual_seed(2**31)
        network = self.average.module.eval()
        return torch.stack([self._loss(network) for _ in range(batches)]).mean().item()

    def draw(self, per_class: int = 10, steps: int = 50, guidance: float = 1.5) -> None:
        """Draw samples of the average, a row a class, in bfloat16 on a GPU."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda):
            drawn = draw_samples(self.pipeline(), per_class, steps, guidance, seed=0)
        save_image(caption_grid(*drawn), self.folder / "samples.png")
