"""The benchmark: any model of the package beside any other, in one process, in turns.

    python eval/throughput.py                                            # D-EMOv2-S-2 against DiT-S-2 on this machine
    python eval/throughput.py --models D-EMOv2-XL-2 DiT-XL-2 --batch 32 64 128 256 --dtypes bfloat16 --compile blocks
    python eval/throughput.py --latent 32 64 128 --jobs forward          # cost as the image grows
    python eval/throughput.py --models D-EMOv2-S-2 D-EMOv2-S-2@reference diffusers:DiT-S-2 timm:vit_small_patch16_224

A model is a name of `d_emo.list_models()`, `diffusers:DiT-S-2` (Diffusers' own network at that size) or `timm:NAME`.
`NAME@reference` runs plain PyTorch in place of the fast kernels, `NAME@checkpointed` recomputes activations, and
`NAME@reference+checkpointed` does both. The last model is the baseline of every ratio.
Every model runs once a round, for `--repeats` rounds after a warm-up; a matrix product is timed in every round too.

Jobs: `forward` (no gradients), `train` (forward, backward, AdamW step), `sample` (DEMOPipeline, guidance 4). bfloat16
is the weights' type in `forward` and `sample`, and autocast in `train`, as users run them. FLOPs are those of products
and convolutions; a training step counts as three forward passes. Memory is the peak above what is held before the job.
"""

import argparse
import gc
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from d_emo import DEMOPipeline, create_model
from d_emo.eval.peak_memory import PeakMemory
from d_emo.files import write_json
from d_emo.kernels import use_backend
from d_emo.models.variants import model_spec
from d_emo.processes import keep_freed_memory

JOBS = ("forward", "train", "sample")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLE_STEPS = 10
VARIANTS = ("reference", "checkpointed")


@dataclass(frozen=True)
class Case:
    """One row's conditions, apart from the model."""

    job: str
    dtype: str
    compile: str
    batch: int
    latent: int
    depth: int | None

    @property
    def label(self) -> str:
        """The conditions, for people."""
        depth = f", depth {self.depth}" if self.depth else ""
        compiled = ", compiled" if self.compile != "none" else ""
        return f"{self.job} {self.dtype}, batch {self.batch}, {self.latent}x{self.latent}{depth}{compiled}"


@dataclass
class Result:
    """Measurements of one model in one case; seconds a run, one entry a round."""

    model: str
    case: Case
    flops: int
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, over the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


class Subject:
    """A model that is ready to do a job again and again."""

    def __init__(self, name: str, case: Case, device: torch.device):
        self.name, self.case, self.device = name, case, device
        plain, variants = split_name(name)
        self.backend = "reference" if "reference" in variants else "auto"
        self.model = build(plain, case)
        self.inputs = make_inputs(self.model, plain, case, device)
        with torch.device("meta"):
            self.flops = count_flops(build(plain, case), make_inputs(self.model, plain, case, torch.device("meta")))
        randomize(self.model)
        if "checkpointed" in variants:
            self.model.enable_gradient_checkpointing()
        self.model.to(device)
        self._optimizer: torch.optim.Optimizer | None = None
        self._job: Callable[[], None] = getattr(self, f"_prepare_{case.job}")()
        if case.compile == "blocks":
            compile_blocks(self.model)

    def run(self) -> None:
        """The job, once."""
        with use_backend(self.backend):
            self._job()
        synchronize(self.device)

    def _prepare_forward(self) -> Callable[[], None]:
        dtype = DTYPES[self.case.dtype]
        self.model.eval().to(dtype)
        inputs = [x.to(dtype) if x.is_floating_point() and x.ndim == 4 else x for x in self.inputs]

        def forward() -> None:
            with torch.no_grad():
                self.model(*inputs)

        return forward

    def _prepare_train(self) -> Callable[[], None]:
        self.model.train()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.dtype == "bfloat16")

        def step() -> None:
            with autocast:
                output = self.model(*self.inputs)
            getattr(output, "sample", output).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _prepare_sample(self) -> Callable[[], None]:
        from diffusers import DDIMScheduler

        pipeline = DEMOPipeline(self.model.eval().to(DTYPES[self.case.dtype]), DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        labels = [0] * self.case.batch

        def sample() -> None:
            pipeline(labels, guidance_scale=4.0, num_inference_steps=SAMPLE_STEPS, output_type="latent")

        return sample


def split_name(name: str) -> tuple[str, list[str]]:
    """A model's name and its variants: "D-EMOv2-S-2@reference+checkpointed".

    Raises:
        ValueError: a variant is unknown.
    """
    plain, _, suffix = name.partition("@")
    variants = suffix.split("+") if suffix else []
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"{name}: the variant {variant!r} is unknown; use {' or '.join(VARIANTS)}.")
    return plain, variants


def build(name: str, case: Case) -> Any:
    """A model by its name in this script, with fresh weights, on the default device."""
    family, _, rest = name.rpartition(":")
    if family == "timm":
        import timm

        return timm.create_model(rest)
    overrides: dict[str, Any] = {"sample_size": case.latent} | ({"num_layers": case.depth} if case.depth else {})
    if family == "diffusers":
        from diffusers import DiTTransformer2DModel

        _, size, patch = model_spec(rest)
        return DiTTransformer2DModel(
            num_attention_heads=size.num_attention_heads,
            attention_head_dim=size.hidden_size // size.num_attention_heads,
            in_channels=4,
            out_channels=8,
            patch_size=patch,
            num_embeds_ada_norm=1000,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
            **{"num_layers": size.num_layers, **overrides},
        )
    return create_model(name, **overrides)


def make_inputs(model: Any, name: str, case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Arguments of the model's forward pass."""
    if name.startswith("timm:"):
        return (torch.randn(case.batch, *model.default_cfg["input_size"], device=device),)
    latents = torch.randn(case.batch, 4, case.latent, case.latent, device=device)
    labels = torch.zeros(case.batch, dtype=torch.long, device=device)
    return latents, torch.full((case.batch,), 500, device=device), labels


def randomize(model: torch.nn.Module) -> None:
    """Random weights everywhere: adaLN-Zero's zeros would make gradients zero or denormal, which distorts times."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)


def count_flops(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Floating-point operations of one forward pass."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), use_backend("reference"):
        model.eval()(*inputs)
    return counter.get_total_flops()


def compile_blocks(model: Any) -> None:
    """Compile the repeated block, or the whole of a model that names none."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True)
    else:
        model.compile()


def synchronize(device: torch.device) -> None:
    """Wait for the accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(job: Callable[[], None]) -> float:
    """Seconds that a job takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], None], int]:
    """A product whose rate stands for what the machine can do, and its FLOPs."""
    rows, inner, repeats = (2048, 1024, 8) if device.type == "cpu" else (8192, 8192, 8)
    left, right = torch.randn(rows, inner, device=device).to(dtype), torch.randn(inner, rows, device=device).to(dtype)

    def job() -> None:
        for _ in range(repeats):
            left @ right
        synchronize(device)

    return job, 2 * rows * rows * inner * repeats


def measure(names: list[str], case: Case, repeats: int, device: torch.device) -> tuple[list[Result], float]:
    """Run every model in turns; results in the order of `names`, and the matrix product's FLOP/s."""
    subjects = [Subject(name, case, device) for name in names]
    scale = {"forward": 1, "train": 3, "sample": 2 * SAMPLE_STEPS}[case.job]
    results = [Result(subject.name, case, subject.flops * scale) for subject in subjects]
    product, product_flops = matrix_product(DTYPES[case.dtype], device)
    for subject, result in zip(subjects, results, strict=True):
        subject.run()  # warm-up: compiles, allocates, makes the optimizer's state
        with PeakMemory(device) as peak:
            subject.run()
        result.peak_mib = peak.mib
    rates = []
    for _ in range(repeats):
        for subject, result in zip(subjects, results, strict=True):
            result.seconds.append(timed(subject.run))
        rates.append(product_flops / timed(product))
    return results, statistics.median(rates)


HEADER = (
    "| case | model | ms | spread | images/s | ratio | GFLOP/s | of matrix product | peak MiB |\n" + "|---" * 9 + "|"
)


def row(result: Result, baseline: Result, rate: float) -> str:
    """A line of the table; the ratio is the baseline's time over this model's."""
    case = result.case
    achieved = result.flops / result.median
    peak = "-" if result.peak_mib is None else f"{result.peak_mib:.0f}"
    return (
        f"| {case.label} | {result.model} | {1e3 * result.median:.0f} | {result.spread:.1%} "
        f"| {case.batch / result.median:.1f} | {baseline.median / result.median:.2f} | {achieved / 1e9:.0f} "
        f"| {achieved / rate:.0%} | {peak} |"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratio to the baseline, one group a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = list(dict.fromkeys(entry["label"] for entry in rows))
    models = list(dict.fromkeys(entry["model"] for entry in rows))
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.3 * len(labels) * len(models)), layout="constrained")
    height = 0.8 / len(models)
    for place, model in enumerate(models):
        chosen = [entry for entry in rows if entry["model"] == model]
        positions = [labels.index(entry["label"]) + place * height for entry in chosen]
        bars = axes.barh(positions, [entry["ratio"] for entry in chosen], height * 0.9, label=model)
        axes.bar_label(bars, [f"{entry['ratio']:.2f}" for entry in chosen], padding=3, fontsize=8)
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)  # room for the figures beside the bars
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"speed, {models[-1]} = 1")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["D-EMOv2-S-2", "DiT-S-2"], help="The last is the baseline.")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=["forward", "train"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--compile", nargs="+", choices=("none", "blocks"), default=["none"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--latent", nargs="+", type=int, default=[32], help="Side of the latent.")
    parser.add_argument("--depth", nargs="+", type=int, default=[None], help="Blocks in place of the model's own.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads. Default: all cores.")
    parser.add_argument("--output", type=Path, help="Folder for results.json, table.md and ratios.png.")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats {options.repeats}: a median and a spread take at least 2.")
    if min(options.batch + options.latent) < 1:
        parser.error("--batch and --latent must be positive.")
    if "sample" in options.jobs and any(":" in name for name in options.models):
        parser.error("--jobs sample takes models of this package only; leave diffusers: and timm: names out.")
    for name in options.models:
        try:
            plain, _ = split_name(name)
            if plain.startswith("timm:") and importlib.util.find_spec("timm") is None:
                parser.error(f"{name} needs the package timm: pip install timm.")
            if not plain.startswith("timm:"):
                model_spec(plain.removeprefix("diffusers:"))
        except ValueError as error:
            parser.error(str(error))
    return options


def main(arguments: list[str]) -> None:
    """Measure every case, print the table as it grows, write the files."""
    options = parse(arguments)
    keep_freed_memory()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    if options.threads:
        torch.set_num_threads(options.threads)
    about = machine(device)
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}\n\n{HEADER}", flush=True)
    rows, lines = [], []
    grid = (options.jobs, options.dtypes, options.compile, options.batch, options.latent, options.depth)
    cases = [Case(*values) for values in itertools.product(*grid)]
    for case in tqdm(cases, desc="cases", disable=not sys.stderr.isatty()):
        results, rate = measure(options.models, case, options.repeats, device)
        for result in results:
            lines.append(row(result, results[-1], rate))
            tqdm.write(lines[-1], file=sys.stdout)
            sys.stdout.flush()
            ratio = results[-1].median / result.median
            rows.append(asdict(result) | {"label": case.label, "ratio": ratio, "matrix_product_flops": rate})
        gc.collect()
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / "results.json", {"machine": about, "results": rows})
        (options.output / "table.md").write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
        plot(rows, options.output / "ratios.png")


if __name__ == "__main__":
    main(sys.argv[1:])
