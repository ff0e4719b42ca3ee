"""A file of seeded random Inception weights in the layout of the published ones, where those cannot be fetched.

python tests/helpers/random_inception.py inception_random.pth
"""

import sys
from pathlib import Path
from unittest import mock

import torch
from torch_fidelity import feature_extractor_inceptionv3 as module


def write_random_inception(path: Path) -> Path:
    """Write the file; He-initialised, so that features keep their size through the network."""
    network_class = module.FeatureExtractorInceptionV3
    with (
        mock.patch.object(module, "load_state_dict_from_url", return_value={}),
        mock.patch.object(network_class, "load_state_dict"),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(0)
        network = network_class("inception", ["2048"])
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), path)
    return path


if __name__ == "__main__":
    write_random_inception(Path(sys.argv[1]))
