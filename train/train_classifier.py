"""Train EMOv2, EMOv1 or any network of timm on class-labelled images.

    accelerate launch train/train_classifier.py --config train/configs/classifier/digits.yaml
    accelerate launch train/train_classifier.py --config train/configs/classifier/emov2.yaml --model EMOv2-5M \\
        --train-data-dir imagenet/train --validation-dir imagenet/val
    accelerate launch train/train_classifier.py --config train/configs/classifier/finetune.yaml \\
        --init-from EMOv2-5M --train-data-dir my_photos

The same script runs on a CPU, a GPU or many; options are in `classification/config.py`, the way from there in
`classification/trainer.py`. It writes a folder that `transformers.pipeline("image-classification")` loads.
"""

import sys

from d_emo.common.commands import command
from d_emo.train.classification.config import parse_classifier_config


@command("train_classifier", extra="train", kept="continue with --resume-from latest")
def main(arguments: list[str]) -> None:
    """Read the options, then train."""
    config = parse_classifier_config(arguments, __doc__)
    from d_emo.train.classification import trainer  # seconds of imports, which --help does without

    trainer.run(config)


if __name__ == "__main__":
    main(sys.argv[1:])
