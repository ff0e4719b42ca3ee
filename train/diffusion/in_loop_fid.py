"""FID while training: the quick protocol on the averaged weights, a curve beside the loss curve.

The same code scores finished checkpoints (`d_emo.eval.evaluate_fid`). Samples are deleted once they are scored; scores,
a grid and the curve stay in the run's `fid/` folder.
"""

import shutil

from accelerate import Accelerator

from d_emo.eval.fid.evaluation import FEATURES_FOLDER, Evaluator
from d_emo.eval.fid.extractors import make_extractor
from d_emo.eval.fid.image_sets import ImageSet, view
from d_emo.eval.fid.protocol import with_settings
from d_emo.eval.fid.references import default_cache, load_reference
from d_emo.eval.fid.report import load_entries, plot_curve
from d_emo.eval.fid.scoring import Scores
from d_emo.pipelines import DEMOPipeline
from d_emo.pipelines.checks import FLOW_MAP_STEPS
from d_emo.train.diffusion.plan import Plan

PRESET = "quick"
# More reference images than these change a score of 5,000 samples by less than its own noise.
MAX_REFERENCE_IMAGES = 50_000


class InLoopFID:
    """Scores the averaged model of a run now and then.

    Args:
        plan: the run.
        accelerator: its processes; all of them draw.

    Raises:
        ValueError: weights or reference are missing; found before training starts.
    """

    def __init__(self, plan: Plan, accelerator: Accelerator):
        options = plan.config.run
        self.accelerator = accelerator
        self.name = plan.model_name
        self.folder = plan.output_dir / "fid"
        few = {} if plan.model_config["end_block"] is None else {"steps": FLOW_MAP_STEPS}
        changes = {"num_images": options.fid_images, "seed": options.seed % 2**32, **few}
        self.settings = with_settings(PRESET, changes)
        with accelerator.local_main_process_first():
            extractor = make_extractor(options.fid_features, options.fid_inception_weights)
        extractor.to(accelerator.device)
        source: str | ImageSet
        size = plan.resolution, plan.resolution
        if options.fid_reference is None:
            images = view(plan.source, size, "training data")
            source, cache = images.first(min(len(images), MAX_REFERENCE_IMAGES)), self.folder / "reference"
        else:
            source, cache = options.fid_reference, default_cache()
        # Latents do not say what their pictures were: the samples are what the autoencoder makes.
        channels = plan.source.channels if plan.space is None else plan.space.image_channels
        reference = load_reference(source, extractor, cache, accelerator, size=size, channels=channels)
        self.evaluator = Evaluator(
            reference=reference,
            extractor=extractor,
            accelerator=accelerator,
            batch_size=plan.layout.micro_batch_size,
        )

    def score(self, pipeline: DEMOPipeline, step: int) -> Scores:
        """Scores of the pipeline's averaged model at a step; every process calls this."""
        target = self.folder / f"step-{step:07d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(target, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        scores = self.evaluator.score_pipeline(pipeline, self.settings, PRESET, target)
        if self.accelerator.is_main_process:
            for part in ("samples", FEATURES_FOLDER):
                shutil.rmtree(target / part)
            plot_curve(self.folder / "fid.png", load_entries(self.folder, self.name), None, self.name)
        return scores


def make_in_loop_fid(plan: Plan, accelerator: Accelerator) -> InLoopFID | None:
    """What --fid-every asks for, or None."""
    return InLoopFID(plan, accelerator) if plan.config.run.fid_every else None
