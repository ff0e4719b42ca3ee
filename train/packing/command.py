"""What `make_packaged` does after it has read its options: train, save in float16, score, describe."""

import argparse
import json
import shutil
from pathlib import Path
from types import ModuleType

from d_emo.common.files import check_writable, holds_something, read_json, remove, written_folder
from d_emo.common.float16 import save_float16
from d_emo.common.output import say
from d_emo.train.engine.checkpoints import CARD, list_checkpoints
from d_emo.train.engine.options import RUN_FILE
from d_emo.train.packing import drawing, reading
from d_emo.train.packing.card import packaged_card
from d_emo.train.packing.recipes import RECIPES

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
KINDS: dict[str, ModuleType] = {"draws": drawing, "classifies": reading}


def run(options: argparse.Namespace) -> None:
    """Make a packaged model; a training that is finished or has checkpoints is not begun again."""
    recipe = RECIPES[options.name]
    kind, target = KINDS[recipe.kind], Path(options.output_dir)
    run_dir = Path(options.run_dir or f"runs/{options.name}-packaged")
    check_writable(target, "--output-dir", folder=True)
    if holds_something(target):
        raise ValueError(f"--output-dir {target} is not empty; choose a new folder.")
    if not (run_dir / kind.MARK).is_file():
        again = ["--resume-from", "latest"] if list_checkpoints(run_dir) else []
        kind.train(["--config", str(CONFIGS / recipe.config), "--output-dir", str(run_dir), *again])
    packed = run_dir / "packed"
    remove(packed)
    save_float16(kind.load(str(run_dir)), packed)
    forget_places(packed)
    scores = kind.measure(run_dir, packed, options.name)
    size = sum(file.stat().st_size for file in packed.rglob("*.safetensors"))
    example = tuple(line.replace("{name}", options.name) for line in kind.USAGE)
    run_card = (run_dir / CARD).read_text(encoding="utf-8")
    seed = read_json(run_dir / RUN_FILE, "train again")["seed"]
    card = packaged_card(run_card, options.name, recipe, example, scores, size, seed)
    (packed / CARD).write_text(card, encoding="utf-8")
    with written_folder(target) as partial:
        shutil.copytree(packed, partial, dirs_exist_ok=True)
    say(f"{options.name}: {size / 1e6:.1f} MB of weights and their card in {target}")


def forget_places(folder: Path) -> None:
    """Leave out of configurations where the model was loaded from, which Diffusers notes there."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        content.pop("_name_or_path", None)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
