"""The diffusion trainer's run in progress."""

from dataclasses import dataclass

from d_emo.pipelines import DEMOPipeline
from d_emo.train.diffusion.in_loop_fid import InLoopFID
from d_emo.train.engine.run import TrainingRun


@dataclass(kw_only=True)
class Run(TrainingRun):
    """A run of the diffusion trainer."""

    pipeline: DEMOPipeline
    fid: InLoopFID | None = None
    repository: str | None = None  # of --push-to-hub

    def refresh_pipeline(self) -> None:
        """Bring the averaged weights into the pipeline, before it draws or is saved; every process calls this."""
        self.average.write_into(self.pipeline.transformer)
