"""What the benchmark runs: a model by its name, made ready for a job."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from d_emo import DEMOPipeline
from d_emo.eval.benchmarks.families import Case, family_of, squared
from d_emo.kernels import use_backend
from d_emo.models.compiling import compile_network
from d_emo.models.flops import count_macs_on, count_parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLE_STEPS = 10
VARIANTS = ("reference", "checkpointed", "onnx")


class Subject:
    """A model that is ready to do a job again and again."""

    def __init__(self, name: str, case: Case, device: torch.device):
        self.name, self.case, self.device = name, case, device
        plain, variants = split_name(name)
        self.family = family = family_of(plain)
        self.backend = "reference" if "reference" in variants else "auto"
        with device:  # a large network would take its time on a CPU
            self.model = family.build(plain, case)
        self.inputs = family.inputs(case, device)
        self.parameters = count_parameters(self.model)
        counted_on = torch.device(family.counted_on)
        with counted_on:
            self.flops = 2 * count_macs_on(family.build(plain, case), *family.inputs(case, counted_on))
        if family.drawn:
            randomize(self.model)
        if "checkpointed" in variants:
            getattr(self.model, family.checkpointing)()
        self.model.to(device)
        self._job: Callable[[], None] = getattr(self, f"_prepare_{'onnx' if 'onnx' in variants else case.job}")()
        if case.compile != "none":
            compile_network(self.model, case.compile)

    def run(self) -> None:
        """The job, once."""
        with use_backend(self.backend):
            self._job()
        synchronize(self.device)

    def _prepare_forward(self) -> Callable[[], None]:
        dtype = DTYPES[self.case.dtype]
        self.model.eval().to(dtype)
        inputs = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 1 else x
                  for x in self.inputs]  # fmt: skip

        def forward() -> None:
            with torch.no_grad():
                self.model(*inputs)

        return forward

    def _prepare_onnx(self) -> Callable[[], None]:
        """The same pass in onnxruntime, as many threads as torch has."""
        from d_emo.export import OnnxModel, save_onnx

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            save_onnx(self.model, self.case.size, path, self.case.frames or None)
            run = OnnxModel(path, torch.get_num_threads())

        def forward() -> None:
            run(*self.inputs)

        return forward

    def _prepare_train(self) -> Callable[[], None]:
        self.model.train()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.dtype == "bfloat16")
        loss_of = self.family.loss or squared

        def step() -> None:
            with autocast:
                loss = loss_of(self.model, self.inputs)
            loss.backward()
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


def check_name(name: str, jobs: Sequence[str], dtypes: Sequence[str]) -> None:
    """Refuse what cannot be measured, before anything is.

    Raises:
        ValueError: the name or a variant is unknown, a package is missing, or the job is not one of that model.
    """
    plain, variants = split_name(name)
    family = family_of(plain)
    for variant in variants:
        if variant not in family.variants:
            raise ValueError(f"{name} has no @{variant}; {_choice('@', family.variants)}.")
    if "sample" in jobs and "sample" not in family.jobs:
        raise ValueError(f"{name}: --jobs sample takes diffusion models of this package only.")
    for option, given, known in (("jobs", jobs, family.jobs), ("dtypes", dtypes, family.dtypes)):
        if set(given) - set(known):
            raise ValueError(f"{name} is measured in {' and '.join(known)} only; add --{option} {' '.join(known)}.")
    if "onnx" in variants and ([*jobs] != ["forward"] or [*dtypes] != ["float32"]):
        raise ValueError(f"{name}: @onnx is a forward pass in float32; add --jobs forward --dtypes float32.")


def _choice(mark: str, known: Sequence[str]) -> str:
    return f"it has {', '.join(mark + one for one in known)}" if known else "it has none"


def randomize(model: torch.nn.Module) -> None:
    """Random weights everywhere: adaLN-Zero's zeros would make gradients zero or denormal, which distorts times."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)


def synchronize(device: torch.device) -> None:
    """Wait for the accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
