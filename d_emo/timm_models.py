"""EMOv1 and EMOv2 under timm's names, from the import of this module on; see `d_emo.classification.timm_models`.

    python -m d_emo.timm_models train.py photos --model emov2_1m --num-classes 10
    torchrun --nproc-per-node=2 -m d_emo.timm_models train.py photos --model emov2_1m --num-classes 10

runs any script, timm's own among them, that does not import it itself.
"""

import runpy
import sys
from pathlib import Path

from d_emo.classification.timm_models import TimmEMOv2, timm_name

__all__ = ["TimmEMOv2", "timm_name"]


def run_script(arguments: list[str]) -> None:
    """Run a Python script as `python` would, with the models registered.

    Args:
        arguments: its path, and what is for the script.
    """
    if not arguments or not Path(arguments[0]).is_file():
        given = f"{arguments[0]}: there is no such script" if arguments else "no script was named"
        sys.exit(f"d_emo.timm_models: {given}; python -m d_emo.timm_models train.py ...")
    sys.argv[:] = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)  # where Python looks for a script's own modules
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    run_script(sys.argv[1:])
