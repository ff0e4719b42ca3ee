"""A page to play with a model, in your browser: draw from a pipeline, or drop pictures on a classifier.

    d-emo demo --model digits
    d-emo demo --model runs/digits --max-images 64
    d-emo demo --model EMOv2-folder --host 0.0.0.0 --port 8000

A model is the name of one that comes with the package, a folder, or a Hub id; what it holds decides which page it is.
The page is served on this machine alone unless --host says otherwise, and asks nothing of any other machine.
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

from d_emo.common.commands import command
from d_emo.common.options import OptionTable, option, parse_options, positive, require

LAST_PORT = 65_535


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: str | None = option(None, "Name of a packaged model, folder or Hub id of a pipeline or an image classifier.")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps. Default: the accelerator, if there is one.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Type of the weights.")

    def __post_init__(self):
        require(self.model is not None, "model", "is missing", "name what is to be played with")


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What a visitor may ask for at most."""

    max_images: int = option(16, "Images in one go.")
    max_steps: int = option(250, "Steps of a sampler.")
    max_side: int | None = option(None, "Height and width in pixels. Default: twice the model's own.")
    max_waiting: int = option(8, "Drawings that wait while one is in progress; more are refused.")

    def __post_init__(self):
        positive(self, "max_images", "max_steps", "max_side", "max_waiting")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where the page is."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in, without a password.")
    port: int | None = option(None, "Port to listen on. Default: the first free one from 7860 on.")

    def __post_init__(self):
        allowed = self.port is None or 0 < self.port <= LAST_PORT
        require(allowed, "port", self.port, f"ports are 1 to {LAST_PORT}")


@dataclass(frozen=True, kw_only=True)
class DemoOptions(OptionTable):
    """All options of the command."""

    model: ModelOptions = field(default_factory=ModelOptions)
    limits: LimitOptions = field(default_factory=LimitOptions)
    server: ServerOptions = field(default_factory=ServerOptions)


@command("demo", extra="demo")
def main(arguments: list[str]) -> None:
    """Read the options, then load the model and serve the page until Ctrl-C."""
    options = parse_options(arguments, DemoOptions, "demo", __doc__ or "")
    from d_emo.pipelines.demo import serving  # seconds of imports, which --help does without

    serving.run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
