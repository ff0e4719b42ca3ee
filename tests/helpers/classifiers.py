"""Options of a short run of the classification trainer."""

# A real network of 10,000 parameters, everything else as a user would run it.
TINY_NETWORK = '{"depths": [1, 1, 2, 1], "widths": [8, 8, 16, 16], "head_dims": [8, 8, 8, 8], "drop_path": 0.2}'
TINY = ["--model-config", TINY_NETWORK, "--resolution", "32", "--global-batch-size", "16", "--log-every", "1",
        "--report-to", "none", "--num-workers", "0", "--warmup-epochs", "0"]  # fmt: skip
