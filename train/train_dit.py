"""Train D-EMOv2, DiT or SiT on class-labelled images.

    accelerate launch train/train_dit.py --config train/configs/digits.yaml
    accelerate launch train/train_dit.py --model D-EMOv2-B-2 --train-data-dir imagenet/train --resolution 256

The same script runs on a CPU, a GPU or many; options are in `diffusion/config.py`, the way from there in
`diffusion/trainer.py`. It writes a folder that `DEMOPipeline.from_pretrained` loads.
"""

import sys

from d_emo.common.commands import command
from d_emo.train.diffusion.config import parse_config


@command("train_dit", extra="train", kept="continue with --resume-from latest")
def main(arguments: list[str]) -> None:
    """Read the options, then train."""
    config = parse_config(arguments, __doc__)
    from d_emo.train.diffusion import trainer  # seconds of imports, which --help does without

    trainer.run(config)


if __name__ == "__main__":
    main(sys.argv[1:])
