"""Reading and writing DiT's and SiT's own checkpoints, whole or not at all; the command is `train/convert_dit.py`."""

import argparse
import shutil
from pathlib import Path

import torch

from d_emo.common.files import partial_path, replace_folder, written_whole
from d_emo.common.tensor_files import read_state
from d_emo.images.labels import english_names, imagenet_wnid_to_name
from d_emo.models.published import export_state, import_state, published_config
from d_emo.models.transformer_dit import DiTBaselineTransformer2DModel
from d_emo.pipelines import DEMOPipeline, open_pipeline
from d_emo.train.diffusion.config import OptimizationOptions
from d_emo.train.diffusion.objectives import PREDICTIONS, make_objective
from d_emo.train.diffusion.plan import load_vae

IMAGENET_CLASSES = 1000


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
    names = dict(enumerate(english_names(imagenet_wnid_to_name()))) if named else None
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
