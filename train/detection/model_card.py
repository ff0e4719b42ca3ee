"""The model card of a saved detector: what it is, how it was trained, how well it does."""

import json
from collections.abc import Sequence
from typing import Any

from d_emo.train.detection.plan import DetectorPlan
from d_emo.train.engine import cards
from d_emo.train.engine.cards import Circumstances
from d_emo.train.engine.validation_log import read_validation

TITLES = {"ssdlite": "SSDLite", "retinanet": "RetinaNet", "mask_rcnn": "Mask R-CNN"}
# What a reader wants first; run.json has everything.
SHOWN = ("init_from", "model_config", "detector_config", "resolution", "frozen_stages", "fixed_statistics", "epochs",
         "max_train_steps", "global_batch_size", "learning_rate", "lr_multipliers", "weight_decay", "no_weight_decay",
         "lr_warmup_steps", "lr_decay", "max_grad_norm", "ema_decay", "zoom_out", "iou_crop", "photometric",
         "random_flip", "mixed_precision", "seed")  # fmt: skip


def detector_card(plan: DetectorPlan, circumstances: Circumstances, score_names: Sequence[str]) -> str:
    """A README.md in the Hub's format for the averaged weights of a run at a step."""
    options, names, title = plan.config.model, list(plan.source.id2label.values()), TITLES[plan.system]
    start = f", fine-tuned from {cards.base_name(options.init_from)}" if options.init_from else ""
    validation = [row for row in read_validation(plan.output_dir) if row["step"] <= circumstances.step]
    task = "image-segmentation" if plan.system == "mask_rcnn" else "object-detection"
    header = cards.card_metadata(plan, ["EMOv2", title], "d_emo", task)
    scores = ["No validation image was named, so nothing was scored."]
    if validation and plan.validation is not None:
        header["model-index"] = [_result(circumstances.name, plan.validation.name, validation[-1], score_names)]
        scores = [
            f"Averaged weights on {plan.validation.name}, {plan.validation.describe_size()}, by COCO's rules:",
            "",
            f"| step | {' | '.join(name.replace('_', ' ') for name in score_names)} |",
            f"|---|{'---|' * len(score_names)}",
            *(
                f"| {row['step']:,.0f} | {' | '.join(f'{row[name]:.1%}' for name in score_names)} |"
                for row in validation[-5:]
            ),
        ]
    settings = {**plan.config.flat(), "init_from": options.init_from and cards.base_name(options.init_from)}
    masks = ", masks" if plan.system == "mask_rcnn" else ""
    lines = [
        *cards.card_head(header, f"{circumstances.name}: {plan.model_name} on {plan.source.name}"),
        f"Finds objects in images: {title} on EMOv2{start}, trained with d_emo. This folder holds the **averaged** "
        f"weights after {circumstances.step:,} of {plan.max_train_steps:,} steps.",
        "",
        *cards.card_picture(circumstances.picture, "Loss and mean average precision while training"),
        *cards.usage([
            "import PIL.Image",
            "from torchvision.transforms.v2.functional import to_dtype, to_image",
            "import torch",
            "",
            "from d_emo.detection.saved import load_detector",
            "",
            f"detector = load_detector({json.dumps(circumstances.weights)})",
            'photo = to_dtype(to_image(PIL.Image.open("photo.jpg").convert("RGB")), torch.float32, scale=True)',
            "with torch.inference_mode():",
            f"    (found,) = detector.model.eval()([photo])  # boxes (x1, y1, x2, y2), labels, scores{masks}",
            'print([detector.id2label[label] for label in found["labels"].tolist()])',
        ]),
        f"Data: {plan.source.name}, {plan.source.describe_size()}, {len(names)} classes ({cards.class_list(names)}). "
        f"Augmentation: {plan.augmentation.describe()}.",
        "",
        *scores,
        "",
        *cards.settings_table(settings, SHOWN),
        "",
        *cards.how_it_was_trained(plan, "d_emo.train.train_detector", circumstances, ("torch", "torchvision")),
        *cards.licence(plan, "The data"),
        *cards.citation("EMOv2"),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _result(name: str, dataset: str, row: dict[str, float], score_names: Sequence[str]) -> dict[str, Any]:
    """The last scores, as the Hub's evaluation table reads them."""
    return {
        "name": name,
        "results": [{
            "task": {"type": "object-detection"},
            "dataset": {"name": dataset, "type": dataset.split(",")[0]},
            "metrics": [
                {"type": score, "name": score.replace("_", " "), "value": round(row[score], 4)}
                for score in score_names
            ],
        }],
    }  # fmt: skip
