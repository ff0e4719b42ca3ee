"""Every command by the name that `d-emo` takes. Modules are texts, imported when their command is called."""

from typing import NamedTuple

PROGRAM = "d-emo"


class Named(NamedTuple):
    """A command.

    Attributes:
        module: that has its `main(arguments)`.
        about: a line for the list.
        launched: whether Accelerate's launcher may start several processes of it.
    """

    module: str
    about: str
    launched: bool = False


GROUPS: dict[str, dict[str, Named]] = {
    "draw": {
        "sample": Named("d_emo.pipelines.sample", "pictures of classes: a grid or a folder of files"),
        "demo": Named("d_emo.pipelines.demo.app", "a page in the browser to draw and to classify"),
    },
    "train": {
        "train": Named("d_emo.train.train_dit", "D-EMOv2, DiT or SiT on class-labelled images", True),
        "train-classifier": Named("d_emo.train.train_classifier", "an image classifier", True),
        "train-segmenter": Named("d_emo.train.train_segmenter", "a segmenter", True),
        "train-detector": Named("d_emo.train.train_detector", "a detector", True),
        "train-video-classifier": Named("d_emo.train.train_video_classifier", "a video classifier", True),
        "encode": Named("d_emo.train.encode_latents", "latents of a data set, once for all epochs", True),
        "camera-motion": Named("d_emo.train.make_camera_motion", "clips of moving cameras, made of photos"),
        "choose-average": Named("d_emo.train.choose_average", "other averages of a run, made of its snapshots"),
        "make-packaged": Named("d_emo.train.make_packaged", "the models that come along, as they were made"),
    },
    "measure": {
        "fid": Named("d_emo.eval.evaluate_fid", "FID and its relatives, of a model or of images", True),
        "accuracy": Named("d_emo.eval.evaluate_classifier", "top-1 and top-5 of an image classifier"),
        "video-accuracy": Named("d_emo.eval.evaluate_video_classifier", "top-1 and top-5 of a video classifier"),
        "segmenter-iou": Named("d_emo.eval.evaluate_segmenter", "mean intersection over union of a segmenter"),
        "detector-map": Named("d_emo.eval.evaluate_detector", "mean average precision of a detector"),
        "digits-report": Named(
            "d_emo.eval.evaluate_digits", "drawn digits: are they read as asked for, are they copies?"
        ),
        "receptive-field": Named("d_emo.eval.receptive_field", "how far backbones see"),
        "recipe-table": Named("d_emo.eval.recipe_table", "recipes of the diffusion trainer, trained for equal time"),
        "compare": Named("d_emo.eval.compare_runs", "training runs side by side"),
        "bench": Named("d_emo.eval.throughput", "speed and memory of models in turns"),
    },
    "convert": {
        "convert": Named("d_emo.train.convert_dit", "published DiT, SiT, LightningDiT, JiT to pipelines, and back"),
        "convert-classifier": Named("d_emo.train.convert_emov2", "published EMOv2 to transformers"),
        "export": Named("d_emo.eval.export_classifier", "networks to ONNX, torch.export, Core ML"),
    },
    "look up": {
        "models": Named("d_emo.cli.models", "what can be made by name, with parameters, and what comes along"),
        "completion": Named("d_emo.cli.completion", "completion of these commands for bash or zsh"),
    },
}
COMMANDS: dict[str, Named] = {name: named for group in GROUPS.values() for name, named in group.items()}
# What to type for each, by its module.
WORDS = {named.module: f"{PROGRAM} {name}" for name, named in COMMANDS.items()}


def candidates() -> dict[str, str]:
    """Names by what somebody may type for them: those of their scripts, and their own."""
    scripts = {named.module.rpartition(".")[2].replace("_", "-"): name for name, named in COMMANDS.items()}
    return {**scripts, **{name: name for name in COMMANDS}}
