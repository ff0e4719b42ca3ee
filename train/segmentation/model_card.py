"""The model card of a saved segmenter: what it is, how it was trained, how well it does."""

from typing import Any

from d_emo.train.engine import cards
from d_emo.train.engine.cards import Circumstances
from d_emo.train.engine.validation_log import read_validation
from d_emo.train.segmentation.plan import SegmenterPlan

# What a reader wants first; run.json has everything.
SHOWN = ("init_from", "model_config", "crop_size", "epochs", "max_train_steps", "global_batch_size", "learning_rate",
         "lr_multipliers", "weight_decay", "no_weight_decay", "lr_warmup_steps", "max_grad_norm", "ema_decay",
         "short_side", "scale_min", "scale_max", "crop_max_share", "random_flip", "photometric", "validation_window",
         "mixed_precision", "seed")  # fmt: skip
METRICS = {"miou": "mIoU", "mdice": "mDice", "aacc": "aAcc", "macc": "mAcc"}


def segmenter_card(plan: SegmenterPlan, circumstances: Circumstances) -> str:
    """A README.md in the Hub's format for the averaged weights of a run at a step."""
    options, names = plan.config.model, list(plan.source.id2label.values())
    start = f", fine-tuned from {cards.base_name(options.init_from)}" if options.init_from else ""
    validation = [row for row in read_validation(plan.output_dir) if row["step"] <= circumstances.step]
    header = cards.card_metadata(plan, ["EMOv2"], "transformers", "image-segmentation")
    scores = ["No image to validate on was named, so nothing was scored."]
    if validation and plan.validation is not None:
        header["model-index"] = [_result(circumstances.name, plan.validation.name, validation[-1])]
        where = (
            f"windows of {plan.config.run.validation_window} every {plan.config.run.stride} pixels"
            if plan.config.run.validation_window
            else "whole images"
        )
        scores = [
            f"Averaged weights on {plan.validation.name}, {plan.validation.describe_size()}, {where}, at the labels' "
            "size, from sums over all pixels:",
            "",
            f"| step | {' | '.join(METRICS.values())} |",
            f"|{'---|' * (1 + len(METRICS))}",
            *(
                f"| {row['step']:,.0f} | {' | '.join(f'{row[name]:.2%}' for name in METRICS)} |"
                for row in validation[-5:]
            ),
        ]
    settings = {**plan.config.flat(), "init_from": options.init_from and cards.base_name(options.init_from)}
    lines = [
        *cards.card_head(header, f"{circumstances.name}: {plan.model_name} on {plan.source.name}"),
        f"Segments images into {len(names)} classes: {plan.model_name}{start}, trained with d_emo on crops of "
        f"{options.crop_size} x {options.crop_size} pixels. This folder holds the **averaged** weights after "
        f"{circumstances.step:,} of {plan.max_train_steps:,} steps.",
        "",
        *cards.card_picture(circumstances.picture, "Loss and scores while training"),
        *cards.usage(plan.usage_lines(circumstances.weights)),
        f"Data: {plan.source.name}, {plan.source.describe_size()}, {len(names)} classes ({cards.class_list(names)}).",
        "",
        *scores,
        "",
        *cards.settings_table(settings, SHOWN),
        "",
        *cards.how_it_was_trained(plan, "d_emo.train.train_segmenter", circumstances, ("torch", "transformers")),
        *cards.licence(plan, "The data"),
        *cards.citation("EMOv2"),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _result(name: str, dataset: str, row: dict[str, float]) -> dict[str, Any]:
    """The last scores, as the Hub's evaluation table reads them."""
    return {
        "name": name,
        "results": [{
            "task": {"type": "image-segmentation"},
            "dataset": {"name": dataset, "type": dataset.split(",")[0]},
            "metrics": [
                {"type": name, "name": shown, "value": round(row[name], 4)}
                for name, shown in METRICS.items()
                if row[name] == row[name]  # not where no class occurs
            ],
        }],
    }  # fmt: skip
