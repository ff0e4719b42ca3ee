"""Train V-EMOv2 on folders of videos, one a class.

    accelerate launch train/train_video_classifier.py --config train/configs/video/finetune.yaml \\
        --init-from my-image-classifier --train-data-dir my_videos
    accelerate launch train/train_video_classifier.py --config train/configs/video/v_emov2.yaml \\
        --init-from emov2_5m.pth --train-data-dir kinetics/train --validation-dir kinetics/val

The same script runs on a CPU, a GPU or many; options are in `video/config.py`, the way from there in
`video/trainer.py`. It writes a folder that `transformers.pipeline("video-classification")` loads.
"""

import sys

from d_emo.common.commands import command
from d_emo.train.video.config import parse_video_config


@command("train_video_classifier", extra="train,video", kept="continue with --resume-from latest")
def main(arguments: list[str]) -> None:
    """Read the options, then train."""
    config = parse_video_config(arguments, __doc__)
    from d_emo.train.video import trainer  # seconds of imports, which --help does without

    trainer.run(config)


if __name__ == "__main__":
    main(sys.argv[1:])
