"""Train EMOv2 under a decode head, U-EMOv2 or a plain UNet on pictures with masks.

    accelerate launch train/train_segmenter.py --config train/configs/segmenter/finetune.yaml \\
        --init-from EMOv2_5M.pth --train-data-dir my_pictures --validation-share 0.1
    accelerate launch train/train_segmenter.py --config train/configs/segmenter/segformer.yaml \\
        --init-from EMOv2_5M.pth --train-data-dir ade/images/training --validation-dir ade/images/validation \\
        --reduce-zero-label --class-names ade20k_classes.txt

The same script runs on a CPU, a GPU or many; options are in `segmentation/config.py`, the way from there in
`segmentation/trainer.py`. It writes a folder that `transformers.pipeline("image-segmentation")` loads.
"""

import sys

from d_emo.common.commands import command
from d_emo.train.segmentation.config import parse_segmenter_config


@command("train_segmenter", extra="train", kept="continue with --resume-from latest")
def main(arguments: list[str]) -> None:
    """Read the options, then train."""
    config = parse_segmenter_config(arguments, __doc__)
    from d_emo.train.segmentation import trainer  # seconds of imports, which --help does without

    trainer.run(config)


if __name__ == "__main__":
    main(sys.argv[1:])
