"""The model card of a saved segmenter: what it is, how it was trained, how well it does."""

from d_emo.train.engine import cards
from d_emo.train.engine.cards import Circumstances
from d_emo.train.engine.score_cards import Score, model_index, validation_lines
from d_emo.train.segmentation.plan import SegmenterPlan

# What a reader wants first; run.json has everything.
SHOWN = ("init_from", "model_config", "crop_size", "epochs", "max_train_steps", "global_batch_size", "learning_rate",
         "lr_multipliers", "weight_decay", "no_weight_decay", "lr_warmup_steps", "max_grad_norm", "ema_decay",
         "short_side", "scale_min", "scale_max", "crop_max_share", "random_flip", "photometric", "validation_window",
         "mixed_precision", "seed")  # fmt: skip
METRICS = {"miou": "mIoU", "mdice": "mDice", "aacc": "aAcc", "macc": "mAcc"}
SCORES = tuple(Score(name, title, (name, title)) for name, title in METRICS.items())


def segmenter_card(plan: SegmenterPlan, circumstances: Circumstances) -> str:
    """A README.md in the Hub's format for the averaged weights of a run at a step."""
    options, names = plan.config.model, list(plan.source.id2label.values())
    start = f", fine-tuned from {cards.base_name(options.init_from)}" if options.init_from else ""
    task, run = "image-segmentation", plan.config.run
    header = {
        **cards.card_metadata(plan, ["EMOv2"], "transformers", task),
        **model_index(plan, circumstances, task, SCORES),
    }
    window = run.validation_window
    where = f"windows of {window} every {run.stride} pixels" if window else "whole images"
    how = f", {where}, at the labels' size, from sums over all pixels"
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
        *validation_lines(plan, circumstances, SCORES, how),
        "",
        *cards.settings_table(settings, SHOWN),
        "",
        *cards.how_it_was_trained(plan, "d_emo.train.train_segmenter", circumstances, ("torch", "transformers")),
        *cards.licence(plan, "The data"),
        *cards.citation("EMOv2"),
    ]
    return "\n".join(lines).rstrip() + "\n"
