"""What the model cards of all trainers have in common: the Hub's fields, and how the run went."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from d_emo.common.output import duration
from d_emo.common.saved_folders import may_be_on_hub
from d_emo.common.versions import versions
from d_emo.train.engine.plan import RunPlan

MAX_CLASSES = 20
# Options that say where and how a run was made rather than what it is, and are left out of its command.
PRIVATE_OPTIONS = frozenset({
    "output_dir", "resume_from", "allow_change", "dry_run", "report_to", "num_workers", "cpu_threads", "push_to_hub",
    "hub_model_id", "hub_private", "keep_checkpoints", "keep_every", "license",
})  # fmt: skip

CITATIONS = {
    "EMOv2": """@article{zhang2025emov2,
  title   = {{EMOv2}: Pushing {5M} Vision Model Frontier},
  author  = {Zhang, Jiangning and Hu, Teng and He, Haoyang and Xue, Zhucun and Wang, Yabiao and Wang, Chengjie and
             Liu, Yong and Li, Xiangtai and Tao, Dacheng},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year    = {2025},
  note    = {arXiv:2412.06674}
}""",
    "DiT": """@inproceedings{peebles2023dit,
  title     = {Scalable Diffusion Models with Transformers},
  author    = {Peebles, William and Xie, Saining},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year      = {2023},
  note      = {arXiv:2212.09748}
}""",
    "LightningDiT": """@inproceedings{yao2025vavae,
  title     = {Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models},
  author    = {Yao, Jingfeng and Yang, Bin and Wang, Xinggang},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2025},
  note      = {arXiv:2501.01423}
}""",
    "JiT": """@article{li2025jit,
  title   = {Back to Basics: Let Denoising Generative Models Denoise},
  author  = {Li, Tianhong and He, Kaiming},
  year    = {2025},
  note    = {arXiv:2511.13720}
}""",
    "DMF": """@article{lee2025dmf,
  title   = {Decoupled {MeanFlow}: Turning Flow Models into Flow Maps for Accelerated Sampling},
  author  = {Lee, Kyungmin and Yu, Sihyun and Shin, Jinwoo},
  journal = {arXiv:2510.24474},
  year    = {2025}
}""",
    "SiT": """@inproceedings{ma2024sit,
  title     = {{SiT}: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers},
  author    = {Ma, Nanye and Goldstein, Mark and Albergo, Michael S. and Boffi, Nicholas M. and Vanden-Eijnden, Eric and
               Xie, Saining},
  booktitle = {European Conference on Computer Vision},
  year      = {2024},
  note      = {arXiv:2401.08740}
}""",
}


@dataclass(frozen=True)
class Circumstances:
    """How a run went up to its card.

    Attributes:
        weights: the folder or Hub id that the card's example loads.
        step: optimizer steps done.
        seconds: that they took.
        hardware: what they ran on.
        picture: a file beside the card, or None.
    """

    weights: str
    step: int
    seconds: float
    hardware: str
    picture: str | None

    @property
    def name(self) -> str:
        """What the run is called: like its folder or repository; a checkpoint like the folder around it."""
        path = Path(self.weights).absolute()
        return path.parent.name if path.name.startswith("checkpoint-") else path.name


def hub_id(name: str | None) -> str | None:
    """A name that is one of the Hub's and of no folder here; None for others."""
    if name is None or Path(name).exists() or not may_be_on_hub(name):
        return None
    return name


def card_metadata(plan: RunPlan, tags: Sequence[str], library: str, task: str) -> dict[str, Any]:
    """The fields that the Hub reads of any trainer's card.

    Args:
        plan: the run.
        tags: besides `d_emo`.
        library: that loads the folder.
        task: one of the Hub's.
    """
    settings = plan.config.flat()
    fields: dict[str, Any] = {"license": settings["license"], "library_name": library, "pipeline_tag": task}
    fields["tags"] = list(dict.fromkeys(["d_emo", *tags]))
    if dataset := hub_id(settings["dataset"]):
        fields["datasets"] = [dataset]
    if base := hub_id(settings["init_from"]):
        fields["base_model"] = base
        fields["base_model_relation"] = "adapter" if settings.get("lora_rank") else "finetune"
    return {name: value for name, value in fields.items() if value is not None}


def card_head(metadata: Mapping[str, Any], title: str) -> list[str]:
    """First lines of a card: what the Hub reads, and the title."""
    return ["---", yaml.safe_dump(dict(metadata), sort_keys=False).strip(), "---", "", f"# {title}", ""]


def card_picture(picture: str | None, about: str) -> list[str]:
    """Lines that show a picture, or none."""
    return [f"![{about}]({picture})", ""] if picture else []


def usage(code: Sequence[str]) -> list[str]:
    """How to install the package, and the example."""
    return ["```bash", "pip install d-emo", "```", "", "```python", *code, "```", ""]


def base_name(init_from: str) -> str:
    """What a run started from, for people: a Hub id, or the folder's own name."""
    path = Path(init_from)
    if not path.is_absolute() and not path.exists():
        return init_from
    path = path.absolute()
    return f"{path.parent.name}/{path.name}" if path.name.startswith("checkpoint-") else path.name


def class_list(names: Sequence[str]) -> str:
    """The first names, for people."""
    return ", ".join(names[:MAX_CLASSES]) + (" ..." if len(names) > MAX_CLASSES else "")


def settings_table(settings: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    """Lines of a table of the settings that have a value."""
    rows = [f"| {name} | {settings[name]} |" for name in shown if settings[name] is not None]
    return ["| setting | value |", "|---|---|", *rows]


def how_it_was_trained(plan: RunPlan, module: str, circumstances: Circumstances, libraries: Sequence[str]) -> list[str]:
    """Lines with the command, the time, the machine and the versions.

    Args:
        plan: the run.
        module: of the trainer, to run with -m.
        circumstances: how it went.
        libraries: whose versions matter.
    """
    return [
        "## How it was trained",
        "",
        "```bash",
        training_command(plan, module),
        "```",
        "",
        f"{circumstances.step:,} steps took {duration(circumstances.seconds)} on {circumstances.hardware}, with "
        f"{versions(*libraries)}.",
        "",
    ]


def training_command(plan: RunPlan, module: str) -> str:
    """The command that makes such a run: its options where they are not the defaults, of absolute paths the names."""
    defaults = type(plan.config)().flat()
    words = ["accelerate", "launch", "-m", module]
    for name, value in plan.config.flat().items():
        if name in PRIVATE_OPTIONS or value == defaults[name] or value is None:
            continue
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words += [f"--{name.replace('_', '-')}", Path(text).name if Path(text).is_absolute() else text]
    return shlex.join(words)


def licence(plan: RunPlan, of: str) -> list[str]:
    """Lines on what one may do with the weights, which only those who trained them can say."""
    named = plan.config.flat()["license"]
    text = f"The weights are under `{named}`" if named else "No licence of the weights was named; ask who trained them"
    return [
        "## Licence",
        "",
        f"{text}. {of} may restrict their use further. The package d_emo is under Apache-2.0.",
        "",
    ]


def citation(*works: str) -> list[str]:
    """Lines with the papers' BibTeX."""
    return ["## Citation", "", "```bibtex", "\n\n".join(CITATIONS[work] for work in works), "```"]
