"""Options of a short run of the video trainer, and the trainer as a process."""

from helpers.paths import ROOT
from helpers.processes import Trainer

# A real network of a few thousand parameters, everything else as a user would run it.
TINY_NETWORK = (
    '{"depths": [1, 1, 1, 2], "widths": [8, 8, 8, 16], "head_dims": [8, 8, 8, 8], "expansions": [2, 2, 2, 2], '
    '"window_size": [2, 2, 2], "layer_scale": 1.0, "drop_path": 0.1, "dropout": 0.2}'
)
TINY = ["--model-config", TINY_NETWORK, "--resolution", "32", "--global-batch-size", "4", "--log-every", "1",
        "--report-to", "none", "--num-workers", "0", "--lr-warmup-steps", "0", "--cpu-threads", "1"]  # fmt: skip


class VideoTrainer(Trainer):
    """The video trainer as a process of its own."""

    script = ROOT / "train" / "train_video_classifier.py"
