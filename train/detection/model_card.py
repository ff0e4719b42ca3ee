"""The model card of a saved detector: what it is, how it was trained, how well it does."""

import json
from collections.abc import Sequence

from d_emo.train.detection.plan import DetectorPlan
from d_emo.train.engine import cards
from d_emo.train.engine.cards import Circumstances
from d_emo.train.engine.score_cards import Score, model_index, validation_lines

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
    columns = [Score(name, shown := name.replace("_", " "), (name, shown), ".1%") for name in score_names]
    task = "image-segmentation" if plan.system == "mask_rcnn" else "object-detection"
    header = {
        **cards.card_metadata(plan, ["EMOv2", title], "d_emo", task),
        **model_index(plan, circumstances, "object-detection", columns),
    }
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
        *validation_lines(plan, circumstances, columns, ", by COCO's rules"),
        "",
        *cards.settings_table(settings, SHOWN),
        "",
        *cards.how_it_was_trained(plan, "d_emo.train.train_detector", circumstances, ("torch", "torchvision")),
        *cards.licence(plan, "The data"),
        *cards.citation("EMOv2"),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"
