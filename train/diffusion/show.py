"""What the diffusion trainer shows on its way: sample grids, the loss curve, quick FIDs, each also to the tracker."""

from d_emo.common.figures import caption_grid, save_image
from d_emo.common.files import make_folder
from d_emo.eval.fid.scoring import summary
from d_emo.pipelines import DEMOPipeline, NonFiniteSampleError
from d_emo.train.diffusion import figures
from d_emo.train.diffusion.in_loop_fid import InLoopFID
from d_emo.train.diffusion.plan import grid_steps
from d_emo.train.diffusion.run import Run
from d_emo.train.engine.log import LOG_FILE
from d_emo.train.engine.trackers import track_image


def show_samples(run: Run) -> None:
    """Save a grid of samples of the averaged model; the main process draws, the others wait."""
    pipeline = run.result()
    if run.accelerator.is_main_process:
        try:
            _draw_grid(run, pipeline)
        except NonFiniteSampleError as error:
            run.report(f"no samples, {error}")  # a grid is not worth the run
    run.accelerator.wait_for_everyone()


def _draw_grid(run: Run, pipeline: DEMOPipeline) -> None:
    accelerator, options = run.accelerator, run.plan.config.run
    count, scale = options.samples_per_class, options.sample_guidance_scale
    steps = grid_steps(options, pipeline)
    with accelerator.autocast():
        rows, captions = figures.draw_samples(pipeline, count, steps, scale, options.seed)
    grid = caption_grid(rows, captions)
    path = figures.grid_path(run.output_dir, run.step)
    make_folder(path.parent)
    save_image(grid, path)
    plot_losses(run)
    run.report(f"samples in {path}")
    track_image(accelerator, "samples", grid, run.step)


def score_fid(run: Run, fid: InLoopFID) -> None:
    """Score the averaged model, say and track the scores."""
    scores = fid.score(run.result(), run.step)
    if run.accelerator.is_main_process:
        run.report(f"{summary(scores)}; curve in {fid.folder / 'fid.png'}")
        run.accelerator.log({f"quick_{name}": value for name, value in scores.values.items()}, step=run.step)


def plot_losses(run: Run) -> None:
    """Draw the loss curve so far."""
    figures.plot_loss(run.output_dir / LOG_FILE, run.output_dir / "loss.png", run.plan.model_name, run.published)
