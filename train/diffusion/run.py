"""The diffusion trainer's run in progress."""

from dataclasses import dataclass
from pathlib import Path

from d_emo.pipelines import DEMOPipeline
from d_emo.train.diffusion import lora
from d_emo.train.diffusion.draws import Draws
from d_emo.train.diffusion.figures import last_grid
from d_emo.train.diffusion.in_loop_fid import InLoopFID
from d_emo.train.diffusion.model_card import model_card
from d_emo.train.diffusion.on_track import PublishedLoss
from d_emo.train.diffusion.plan import Plan
from d_emo.train.engine.followed import save_followed
from d_emo.train.engine.run import TrainingRun


@dataclass(kw_only=True)
class Run(TrainingRun[Plan]):
    """A run of the diffusion trainer."""

    pipeline: DEMOPipeline
    draws: Draws
    published: PublishedLoss | None = None
    fid: InLoopFID | None = None
    repository: str | None = None  # of --push-to-hub

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained instead of the whole model."""
        return self.plan.config.model.lora_rank is not None

    def result(self) -> DEMOPipeline:
        """See `TrainingRun.result`."""
        self.average.write_into(self.pipeline.transformer)
        return self.pipeline

    def card(self, folder: Path) -> str:
        """See `TrainingRun.card`."""
        sent = self.repository if folder == self.output_dir else None
        return model_card(self.plan, self.circumstances(folder, sent))

    def picture(self) -> Path | None:
        """See `TrainingRun.picture`: the last grid of samples up to this step."""
        return last_grid(self.output_dir, self.step)

    def save_state(self, folder: Path) -> None:
        """See `TrainingRun.save_state`: the pipeline holds merged weights, so averaged adapters are kept beside it."""
        save_followed(self, folder)
        if self.has_adapters and self.accelerator.is_main_process:
            lora.save_average(self.average.module, self.model, folder)

    def save_more(self, folder: Path) -> None:
        """See `TrainingRun.save_more`: also the averaged adapters by themselves."""
        super().save_more(folder)
        if self.has_adapters:
            lora.save_adapters(self.average.module, folder, self.plan.source.id2label, self.plan.config.model.init_from)
