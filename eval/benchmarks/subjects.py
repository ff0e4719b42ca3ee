"""What the benchmark runs: a model by its name, made ready for a job."""

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d_emo import DEMOPipeline, create_classifier, create_model
from d_emo.classification.variants import CLASSIFIERS
from d_emo.kernels import use_backend
from d_emo.models.flops import count_macs_on, count_parameters
from d_emo.models.variants import model_spec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLE_STEPS = 10
VARIANTS = ("reference", "checkpointed", "onnx")
LATENT_CHANNELS = 4
# Every diffusion network for one task, DiT's, whatever it was published for.
TASK = {"in_channels": LATENT_CHANNELS, "learn_sigma": True, "prediction_type": "epsilon", "flow_path": None}


@dataclass(frozen=True)
class Case:
    """One row's conditions, apart from the model; `size` is the side of its latents or images."""

    job: str
    dtype: str
    compile: str
    batch: int
    size: int
    depth: int | None

    @property
    def label(self) -> str:
        """The conditions, for people."""
        depth = f", depth {self.depth}" if self.depth else ""
        compiled = ", compiled" if self.compile != "none" else ""
        return f"{self.job} {self.dtype}, batch {self.batch}, {self.size}x{self.size}{depth}{compiled}"


class Subject:
    """A model that is ready to do a job again and again."""

    def __init__(self, name: str, case: Case, device: torch.device):
        self.name, self.case, self.device = name, case, device
        plain, variants = split_name(name)
        self.backend = "reference" if "reference" in variants else "auto"
        self.model = build(plain, case)
        self.inputs = make_inputs(plain, case, device)
        self.parameters = count_parameters(self.model)
        with torch.device("meta"):
            self.flops = 2 * count_macs_on(build(plain, case), *make_inputs(plain, case, torch.device("meta")))
        if not is_classifier(plain):
            randomize(self.model)
        if "checkpointed" in variants:
            self.model.enable_gradient_checkpointing()
        self.model.to(device)
        self._job: Callable[[], None] = getattr(self, f"_prepare_{'onnx' if 'onnx' in variants else case.job}")()
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

    def _prepare_onnx(self) -> Callable[[], None]:
        """The same pass in onnxruntime, as many threads as torch has."""
        from d_emo.export import OnnxModel, save_onnx

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            save_onnx(self.model, self.case.size, path)
            run = OnnxModel(path, torch.get_num_threads())

        def forward() -> None:
            run(*self.inputs)

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


def is_classifier(name: str) -> bool:
    """Whether a name is one of a network that takes images."""
    return name in CLASSIFIERS or name.startswith("timm:")


def check_name(name: str, case_jobs: Sequence[str], dtypes: Sequence[str]) -> None:
    """Refuse what cannot be measured, before anything is.

    Raises:
        ValueError: the name or a variant is unknown, a package is missing, or the job is not one of that model.
    """
    plain, variants = split_name(name)
    if plain.startswith("timm:"):
        if importlib.util.find_spec("timm") is None:
            raise ValueError(f"{name} needs the package timm: pip install 'd-emo[timm]'.")
    elif not is_classifier(plain):
        model_spec(plain.removeprefix("diffusers:"))
    if "sample" in case_jobs and (is_classifier(plain) or ":" in plain):
        raise ValueError(f"{name}: --jobs sample takes diffusion models of this package only.")
    if "onnx" in variants and not (is_classifier(plain) and [*case_jobs] == ["forward"] and [*dtypes] == ["float32"]):
        raise ValueError(f"{name}: @onnx is for classifiers; add --jobs forward --dtypes float32.")


def build(name: str, case: Case) -> Any:
    """A model by its name in this script, with fresh weights, on the default device."""
    family, _, rest = name.rpartition(":")
    if family == "timm":
        import timm

        return timm.create_model(rest)
    if name in CLASSIFIERS:
        return create_classifier(name, case.size)
    overrides: dict[str, Any] = {"sample_size": case.size} | ({"num_layers": case.depth} if case.depth else {})
    if family == "diffusers":
        from diffusers import DiTTransformer2DModel

        _, size, patch = model_spec(rest)
        return DiTTransformer2DModel(
            num_attention_heads=size.num_attention_heads,
            attention_head_dim=size.hidden_size // size.num_attention_heads,
            in_channels=LATENT_CHANNELS,
            out_channels=2 * LATENT_CHANNELS,
            patch_size=patch,
            num_embeds_ada_norm=1000,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
            **{"num_layers": size.num_layers, **overrides},
        )
    return create_model(name, **TASK, **overrides)


def make_inputs(name: str, case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Arguments of the model's forward pass."""
    if is_classifier(name):
        return (torch.randn(case.batch, 3, case.size, case.size, device=device),)
    latents = torch.randn(case.batch, LATENT_CHANNELS, case.size, case.size, device=device)
    labels = torch.zeros(case.batch, dtype=torch.long, device=device)
    return latents, torch.full((case.batch,), 500, device=device), labels


def randomize(model: torch.nn.Module) -> None:
    """Random weights everywhere: adaLN-Zero's zeros would make gradients zero or denormal, which distorts times."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)


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
