"""Published DiT and SiT checkpoints to pipelines of this package, and its DiT models to the authors' format.

    python train/convert_dit.py DiT-XL-2-256x256.pt --objective dit --output-dir DiT-XL-2-256
    python train/convert_dit.py SiT-XL-2-256.pt --objective sit --output-dir SiT-XL-2-256
    python train/convert_dit.py --export runs/DiT-B-2 dit_b_2.pt

Reads bare state dictionaries and the trainers' full checkpoints (`ema` or `model` inside), without running any code
that a file may hold.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from d_emo.common.files import partial_path, replace_folder, written_whole
from d_emo.common.tensor_files import read_state
from d_emo.images.labels import imagenet_wnid_to_name
from d_emo.models.published import export_state, import_state, published_config
from d_emo.models.transformer_dit import DiTBaselineTransformer2DModel
from d_emo.pipelines import DEMOPipeline, open_pipeline
from d_emo.schedulers.flow_paths import PATHS
from d_emo.train.diffusion.config import OptimizationOptions
from d_emo.train.diffusion.objectives import PREDICTIONS, make_objective
from d_emo.train.diffusion.plan import AUTO_VAE, load_vae

IMAGENET_CLASSES = 1000


def main(arguments: Sequence[str]) -> None:
    """Convert one checkpoint; mistakes end with one line."""
    parser = argparse.ArgumentParser(
        prog="convert_dit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="The .pt file to read, or with --export to write.")
    parser.add_argument("--objective", choices=("dit", "sit"), help="What it was trained for; the file does not tell.")
    parser.add_argument("--flow-path", choices=PATHS, default="linear", help="sit: the path it was trained on.")
    parser.add_argument("--prediction", choices=PREDICTIONS, default="velocity", help="sit: what the network predicts.")
    parser.add_argument("--output-dir", help="Pipeline folder to write.")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="Which ones of a full checkpoint.")
    parser.add_argument("--vae", default=AUTO_VAE, help="Decoder to save with it: folder, Hub id, or none.")
    parser.add_argument("--num-heads", type=int, help="Attention heads, for sizes that were not published.")
    parser.add_argument("--export", metavar="PIPELINE", help="Write the DiT model of this pipeline as a .pt file.")
    options = parser.parse_args(arguments)
    try:
        if options.export:
            export_checkpoint(options.export, Path(options.checkpoint))
        elif not (options.objective and options.output_dir):
            parser.error("--objective and --output-dir are needed to import")
        else:
            import_checkpoint(options)
    except ValueError as error:
        sys.exit(f"convert_dit: {error}")


def import_checkpoint(options: argparse.Namespace) -> None:
    """Write a pipeline folder, whole or not at all."""
    state = read_state(Path(options.checkpoint), ("ema", "model"), options.weights)
    flow = (options.flow_path, PREDICTIONS[options.prediction])
    config = published_config(state, options.objective, options.num_heads, *flow)
    target = Path(options.output_dir)
    if target.exists() and not (target / "model_index.json").is_file() and any(target.iterdir()):
        raise ValueError(f"--output-dir {target} is not empty and holds no pipeline; choose another.")
    vae = load_vae(options.vae)
    model = DiTBaselineTransformer2DModel(**config)
    objective = OptimizationOptions(objective=options.objective)
    import_state(state, model)
    named = config["num_classes"] == IMAGENET_CLASSES
    names = dict(enumerate(imagenet_wnid_to_name().values())) if named else None
    pipeline = DEMOPipeline(model.eval(), make_objective(objective).make_scheduler(), vae=vae, id2label=names)
    partial = partial_path(target)
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    replace_folder(partial, target)
    print(
        f"{options.checkpoint}: {config['num_layers']} blocks of {config['hidden_size']} channels, patch "
        f"{config['patch_size']}, {config['num_classes']} classes, {model.config.prediction_type}; pipeline in {target}"
    )


def export_checkpoint(pipeline: str, path: Path) -> None:
    """Write the transformer of a pipeline under the published names, whole."""
    try:
        state = export_state(open_pipeline(pipeline).transformer)
    except ValueError as error:
        raise ValueError(f"--export {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        torch.save(state, partial)
    print(f"{len(state)} tensors in {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
