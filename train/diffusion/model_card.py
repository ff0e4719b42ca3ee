"""The model card that goes with every saved pipeline: what it is, how it was trained, which weights it holds."""

from d_emo.eval.fid.report import load_entries
from d_emo.eval.fid.scoring import summary
from d_emo.train.diffusion.plan import Plan
from d_emo.train.engine.cards import card_head, class_list, settings_table

# What a reader wants first; run.json has everything.
SHOWN = (
    "objective",
    "init_from",
    "lora_rank",
    "global_batch_size",
    "learning_rate",
    "lr_scheduler",
    "weight_decay",
    "class_dropout_prob",
    "ema_decay",
    "ema_warmup",
    "mixed_precision",
    "min_snr_gamma",
    "flow_path",
    "prediction",
    "loss_weighting",
    "time_sampling",
    "seed",
)


def model_card(plan: Plan, step: int) -> str:
    """A README.md in the Hub's format for the averaged weights of a run at a step."""
    header = {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["d_emo", "class-conditional", plan.model_name, plan.config.optimization.objective],
    }
    names = list(plan.source.id2label.values())
    label = f'"{names[0]}"' if names else ""
    space = "pixels" if plan.vae is None else "latents"
    lines = [
        *card_head(header, f"{plan.model_name} on {plan.source.name}"),
        f"Class-conditional generation of {plan.resolution} x {plan.resolution} images, trained with d_emo on {space}.",
        f"This folder holds the **averaged** weights and BatchNorm statistics after {step:,} of "
        f"{plan.max_train_steps:,} steps.",
        "",
        "```python",
        "from d_emo import DEMOPipeline",
        "",
        f'DEMOPipeline.from_pretrained("FOLDER_OR_HUB_ID")({label}).images[0]',
        "```",
        "",
        f"Data: {plan.source.name}, {plan.source.describe_size()}, {len(names) or 'no'} classes"
        + (f" ({class_list(names)})" if names else "")
        + f", {'' if plan.flip else 'not '}mirrored at random.",
        "",
        *settings_table(plan.config.flat(), SHOWN),
        "",
        *_scores(plan, step),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _scores(plan: Plan, step: int) -> list[str]:
    """What was scored on the way, up to this step."""
    entries = load_entries(plan.output_dir / "fid", plan.model_name)
    lines = [f"| {entry.step:,} | {summary(entry.scores)} |" for entry in entries if (entry.step or 0) <= step]
    if not lines:
        return ["No FID was computed while it trained."]
    return ["Scores while training (quick protocol, not comparable with published figures):", "", "| step | scores |",
            "|---|---|", *lines]  # fmt: skip
