"""Train SSDLite, RetinaNet or Mask R-CNN on EMOv2, on pictures with boxes or masks.

    accelerate launch train/train_detector.py --config train/configs/detector/retinanet.yaml --init-from EMOv2-5M.pth \\
        --train-data-dir coco/train2017 --annotations coco/annotations/instances_train2017.json \\
        --validation-dir coco/val2017 --validation-annotations coco/annotations/instances_val2017.json
    accelerate launch train/train_detector.py --config train/configs/detector/finetune.yaml --init-from EMOv2-5M.pth \\
        --train-data-dir my_photos --annotations my_photos/annotations.json

The same script runs on a CPU, a GPU or many; options are in `detection/config.py`, the way from there in
`detection/trainer.py`. It writes a folder that `d_emo.detection.saved.load_detector` loads.
"""

import sys

from d_emo.common.commands import command
from d_emo.train.detection.config import parse_detector_config


@command("train_detector", extra="train", kept="continue with --resume-from latest")
def main(arguments: list[str]) -> None:
    """Read the options, then train."""
    config = parse_detector_config(arguments, __doc__)
    from d_emo.train.detection import trainer  # seconds of imports, which --help does without

    trainer.run(config)


if __name__ == "__main__":
    main(sys.argv[1:])
