"""Encode a data set with an autoencoder once: training then reads latents and encodes no image again in every epoch.

    accelerate launch train/encode_latents.py --train-data-dir imagenet/train --output-dir latents/imagenet256
    accelerate launch train/train_dit.py --model D-EMOv2-B-2 --latents latents/imagenet256

Stores the autoencoder's posterior of each image and of its mirror image: training draws from it as it would from the
autoencoder. --statistics true also measures mean and deviation a channel, by which training then normalises; on a
finished folder, the same command with it encodes nothing anew.
Run it again to go on after any interruption, on any number of processes.
"""

import sys

from d_emo.common.commands import command
from d_emo.train.diffusion.encode_config import parse_encode_config


@command("encode_latents", extra="train", kept="the same command goes on from here")
def main(arguments: list[str]) -> None:
    """Read the options, then encode what is missing."""
    config = parse_encode_config(arguments, __doc__)
    from d_emo.train.diffusion import encoding  # seconds of imports, which --help does without

    encoding.run(config)


if __name__ == "__main__":
    main(sys.argv[1:])
