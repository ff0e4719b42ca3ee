"""A valid call of every public function and class, and what becomes of it when one argument is another."""

import contextlib
import inspect
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

# What every argument is given in turn, by name; made anew for each call.
VALUES: dict[str, Callable[[], Any]] = {
    "a word": lambda: "word",
    "an empty text": lambda: "",
    "zero": lambda: 0,
    "minus one": lambda: -1,
    "a fraction": lambda: 0.5,
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "1e30": lambda: 1e30,
    "10^30": lambda: 10**30,
    "an empty list": list,
    "a list of words": lambda: ["a", "b"],
    "a mapping": lambda: {"a": 1},
    "an object": object,
    "none": lambda: None,
    "a tensor of no elements": lambda: torch.empty(0),
    "a tensor of NaN": lambda: torch.full((2, 3), float("nan")),
}
PYTORCHS = "a torch.device, which PyTorch checks"
# Seconds in which a call has to answer.
PATIENCE = 60


@dataclass(frozen=True)
class PublicCall:
    """A valid call.

    Attributes:
        function: what is called.
        arguments: by name; made anew for each call, for a call may change them.
        left: arguments that are not swept, with the reason.
        called: what messages call an argument that they do not call by its name.
    """

    function: Callable[[], Callable[..., Any]]
    arguments: Callable[[], dict[str, Any]]
    left: dict[str, str] = field(default_factory=dict)
    called: dict[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Every argument that the signature has, but for *args and **kwargs."""
        parameters = inspect.signature(self.function()).parameters.values()
        plain = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return [name for name in plain if name not in self.left]


class NoAnswer(Exception):
    """A call did not end in time."""


@contextlib.contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Raise `NoAnswer` in what takes longer."""

    def stop(*_: object) -> None:
        raise NoAnswer

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer(call: PublicCall, name: str, value: Any) -> tuple[str, str]:
    """What a call does with one argument replaced: "accepted", "refused" or "broken", and the message."""
    arguments = {**call.arguments(), name: value}
    try:
        with patience(PATIENCE):
            call.function()(**arguments)
    except NoAnswer:
        return "broken", "no answer"
    except (ValueError, TypeError) as error:
        text = str(error)
        if "\n" in text.strip():
            return "broken", f"more than a line: {text[:150]!r}"
        if name not in text and call.called.get(name, name) not in text and not _quotes(text, value):
            return "broken", f"{type(error).__name__} does not name it: {text[:150]!r}"
        return "refused", text
    except Exception as error:
        return "broken", f"raised {type(error).__name__}: {str(error)[:150]!r}"
    return "accepted", ""


def _quotes(text: str, value: Any) -> bool:
    """Whether a message quotes a value that nobody could mistake: a word or a number that was passed."""
    shown = repr(value)
    return (len(shown) > 1 and shown in text) or (isinstance(value, str) and len(value) > 2 and value in text)


def _model(family: str = "D-EMOv2", **more: Any) -> torch.nn.Module:
    from helpers.models import tiny_model

    return tiny_model(family, num_layers=1, **more)


def _network(name: str) -> Callable[[], Callable[..., Any]]:
    import d_emo

    return lambda: getattr(d_emo, name)


def _public(module: str, name: str) -> Callable[[], Callable[..., Any]]:
    import importlib

    return lambda: getattr(importlib.import_module(module), name)


TINY = {"sample_size": 8, "in_channels": 4, "patch_size": 2, "hidden_size": 32, "num_layers": 1,
        "num_attention_heads": 2, "num_classes": 3}  # fmt: skip
CLASSIFIER = {"depths": [1, 1, 1, 1], "widths": [8, 8, 16, 16], "head_dims": [8, 8, 8, 8]}
UNET = {"base_channels": 4, "head_dim": 4}


def _pipeline() -> Callable[..., Any]:
    from helpers.pipelines import tiny_pipeline

    pipeline = tiny_pipeline(num_layers=1)
    pipeline.register_to_config(default_num_inference_steps=2)  # None stands for it
    return pipeline.__call__


def _parts() -> dict[str, Any]:
    from helpers.pipelines import dit_scheduler

    return {"transformer": _model(in_channels=3, num_classes=3), "scheduler": dit_scheduler(), "vae": None,
            "id2label": {0: "a", 1: "b", 2: "c"}, "default_num_inference_steps": 2, "latent_space": None}  # fmt: skip


def _scheduler(name: str, method: str) -> Callable[[], Callable[..., Any]]:
    def bound() -> Callable[..., Any]:
        scheduler = _network(name)()()
        if method == "step":
            scheduler.set_timesteps(4)
        return getattr(scheduler, method)

    return bound


def _sample() -> dict[str, Any]:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"model_output": noise, "timestep": torch.tensor(1000.0), "sample": noise}


def _picture() -> PIL.Image.Image:
    return PIL.Image.new("RGB", (20, 16))


CALLS: dict[str, PublicCall] = {
    "create_model": PublicCall(_network("create_model"), lambda: {"name": "D-EMOv2-S-2"}),
    "create_classifier": PublicCall(_network("create_classifier"), lambda: {"name": "EMOv2-1M"},
                                    called={"name": "classifier"}),
    "create_video_classifier": PublicCall(
        _network("create_video_classifier"), lambda: {"name": "V-EMOv2-1M", "depths": [1, 1, 1, 1]},
        called={"name": "video classifier", "image_classifier": "image classifier", "num_classes": "num_labels"},
    ),
    "list_video_classifiers": PublicCall(_network("list_video_classifiers"), dict),
    "VEMOv2Config": PublicCall(_network("VEMOv2Config"), lambda: dict(CLASSIFIER)),
    "VEMOv2ForVideoClassification": PublicCall(
        _network("VEMOv2ForVideoClassification"), lambda: {"config": _video_config()}
    ),
    "VEMOv2ForVideoClassification.forward": PublicCall(
        lambda: _network("VEMOv2ForVideoClassification")()(_video_config()).eval().forward,
        lambda: {"pixel_values": torch.zeros(1, 2, 3, 32, 32)},
        left={"output_hidden_states": "a switch of transformers'", "return_dict": "a switch of transformers'"},
    ),
    "make_video_processor": PublicCall(_network("make_video_processor"), lambda: {"image_size": 32}),
    "read_clip": PublicCall(_network("read_clip"), lambda: {"path": "nowhere.mp4"}, called={"num_frames": "path"}),
    "list_models": PublicCall(_network("list_models"), dict),
    "list_classifiers": PublicCall(_network("list_classifiers"), dict),
    "list_packaged": PublicCall(_network("list_packaged"), dict),
    "packaged": PublicCall(_network("packaged"), lambda: {"name": "digits"}),
    "DEMOTransformer2DModel": PublicCall(_network("DEMOTransformer2DModel"), lambda: dict(TINY)),
    "DiTBaselineTransformer2DModel": PublicCall(_network("DiTBaselineTransformer2DModel"), lambda: dict(TINY)),
    "LightningDiTTransformer2DModel": PublicCall(_network("LightningDiTTransformer2DModel"), lambda: dict(TINY)),
    "JiTTransformer2DModel": PublicCall(_network("JiTTransformer2DModel"), lambda: dict(TINY)),
    "DEMOTransformer2DModel.forward": PublicCall(
        lambda: _model(learn_sigma=False, prediction_type="flow_prediction", end_block=1).forward,
        lambda: {"hidden_states": torch.zeros(1, 4, 16, 16), "timestep": torch.tensor([5]),
                 "class_labels": torch.tensor([1]), "end_timestep": torch.tensor([2])},
    ),
    "DEMOPipeline": PublicCall(_network("DEMOPipeline"), _parts),
    "DEMOPipeline.__call__": PublicCall(_pipeline, lambda: {"class_labels": [1], "num_inference_steps": 2},
                                        called={"class_labels": "label"}),
    "WeightAverage": PublicCall(
        _network("WeightAverage"), lambda: {"model": torch.nn.Linear(2, 2)},
    ),
    "FlowMatchEulerMaruyamaScheduler": PublicCall(_network("FlowMatchEulerMaruyamaScheduler"), dict),
    "FlowMatchEulerMaruyamaScheduler.set_timesteps": PublicCall(
        _scheduler("FlowMatchEulerMaruyamaScheduler", "set_timesteps"), lambda: {"num_inference_steps": 4},
        left={"device": PYTORCHS},
    ),
    "FlowMatchEulerMaruyamaScheduler.step": PublicCall(_scheduler("FlowMatchEulerMaruyamaScheduler", "step"), _sample,
                                                            left={"generator": "Diffusers' randn_tensor checks it"}),
    "FlowMatchSDEHeunScheduler": PublicCall(_network("FlowMatchSDEHeunScheduler"), dict),
    "FlowMatchSDEHeunScheduler.set_timesteps": PublicCall(
        _scheduler("FlowMatchSDEHeunScheduler", "set_timesteps"), lambda: {"num_inference_steps": 4},
        left={"device": PYTORCHS},
    ),
    "FlowMatchSDEHeunScheduler.step": PublicCall(_scheduler("FlowMatchSDEHeunScheduler", "step"), _sample,
                                                      left={"generator": "Diffusers' randn_tensor checks it"}),
    "FlowMatchODESolverScheduler": PublicCall(_network("FlowMatchODESolverScheduler"), dict),
    "EMOv2Config": PublicCall(
        _network("EMOv2Config"), lambda: dict(CLASSIFIER),
        left={"out_features": "transformers' own check", "out_indices": "transformers' own check"},
    ),
    "EMOv2Backbone": PublicCall(_network("EMOv2Backbone"), lambda: {"config": _classifier_config()}),
    "EMOv2Model": PublicCall(_network("EMOv2Model"), lambda: {"config": _classifier_config()}),
    "EMOv2ForImageClassification": PublicCall(
        _network("EMOv2ForImageClassification"), lambda: {"config": _classifier_config()}
    ),
    "EMOv2ForImageClassification.forward": PublicCall(
        lambda: _network("EMOv2ForImageClassification")()(_classifier_config()).eval().forward,
        lambda: {"pixel_values": torch.zeros(1, 3, 32, 32)},
        left={"output_hidden_states": "a switch of transformers'", "return_dict": "a switch of transformers'"},
    ),
    "create_segmenter": PublicCall(_network("create_segmenter"), lambda: {"name": "EMOv2-1M", "head": "segformer"},
                                   called={"name": "segmenter"}),
    "list_segmenters": PublicCall(_network("list_segmenters"), dict),
    "EMOv2SegmentationConfig": PublicCall(
        _network("EMOv2SegmentationConfig"), lambda: {"backbone_config": _classifier_config()}
    ),
    "EMOv2ForSemanticSegmentation": PublicCall(
        _network("EMOv2ForSemanticSegmentation"), lambda: {"config": _segmenter_config()}
    ),
    "EMOv2ForSemanticSegmentation.forward": PublicCall(
        lambda: _network("EMOv2ForSemanticSegmentation")()(_segmenter_config()).eval().forward,
        lambda: {"pixel_values": torch.zeros(1, 3, 32, 32)},
        left={"output_hidden_states": "a switch of transformers'", "return_dict": "a switch of transformers'"},
    ),
    "UEMOv2Config": PublicCall(_network("UEMOv2Config"), lambda: dict(UNET)),
    "UEMOv2ForSemanticSegmentation": PublicCall(
        _network("UEMOv2ForSemanticSegmentation"), lambda: {"config": _unet_config()}
    ),
    "UEMOv2ForSemanticSegmentation.forward": PublicCall(
        lambda: _network("UEMOv2ForSemanticSegmentation")()(_unet_config()).eval().forward,
        lambda: {"pixel_values": torch.zeros(1, 3, 16, 16)},
        left={"output_hidden_states": "a switch of transformers'", "return_dict": "a switch of transformers'"},
    ),
    "predict_in_windows": PublicCall(
        _network("predict_in_windows"),
        lambda: {"model": torch.nn.Conv2d(3, 2, 1), "pixel_values": torch.zeros(1, 3, 20, 16), "window": 16,
                 "stride": 8},
    ),
    "save_float16": PublicCall(
        _network("save_float16"), lambda: {"model": object(), "folder": "nowhere"}, called={"folder": "model"},
    ),
    "I2RMB": PublicCall(_public("d_emo.models", "I2RMB"), lambda: {"dim": 16, "num_heads": 2}),
    "window_attention": PublicCall(
        _public("d_emo.kernels", "window_attention"),
        lambda: {"qkv": torch.randn(1, 4, 4, 24), "attention_type": "spanning", "dim": 8, "num_heads": 2,
                 "window": (2, 2)},
        called={"qkv": "the input"},
    ),
    "set_backend": PublicCall(_public("d_emo.kernels", "set_backend"), lambda: {"name": "auto"},
                              called={"name": "kernels"}),
    "backend_report": PublicCall(_public("d_emo.kernels", "backend_report"), lambda: {"device": "cpu"},
                                 left={"device": PYTORCHS}),
    "default_steps": PublicCall(
        _public("d_emo.pipelines", "default_steps"), lambda: {"scheduler": _parts()["scheduler"]}
    ),
    "open_pipeline": PublicCall(_public("d_emo.pipelines", "open_pipeline"), lambda: {"name": "no/where"},
                                called={"dtype": "no/where"}),
    "frechet_distance": PublicCall(
        _public("d_emo.eval.fid.metrics", "frechet_distance"),
        lambda: dict.fromkeys(("first", "second"), _moments()),
        called=dict.fromkeys(("first", "second"), "a side of the distance"),
    ),
    "inception_score": PublicCall(
        _public("d_emo.eval.fid.metrics", "inception_score"), lambda: {"logits": np.eye(4)}
    ),
    "precision_recall": PublicCall(
        _public("d_emo.eval.fid.metrics", "precision_recall"),
        lambda: {"reference": np.eye(8), "samples": np.eye(8)[::-1] + 0.5},
        left={"device": PYTORCHS},
        called={"samples": "sample features", "reference": "reference features"},
    ),
    "kernel_distance": PublicCall(
        _public("d_emo.eval.fid.metrics", "kernel_distance"), lambda: {"reference": np.eye(8), "samples": np.eye(8)},
        called={"samples": "sample features"},
    ),
    "open_set": PublicCall(_public("d_emo.eval.fid.image_sets", "open_set"), lambda: {"source": "digits"},
                           called={"source": "source", "size": "height"}),
    "center_crop": PublicCall(
        _public("d_emo.images.decode", "center_crop"), lambda: {"image": _picture(), "width": 8}
    ),
    "to_tensor": PublicCall(
        _public("d_emo.images.decode", "to_tensor"), lambda: {"image": _picture(), "channels": 3, "side": 8},
        called={"side": "width"},
    ),
    "read_class_names": PublicCall(_public("d_emo.images.labels", "read_class_names"), lambda: {"source": "imagenet"},
                                   called={"source": "--class-names"}),
    "latents_source": PublicCall(
        _public("d_emo.images.latent_cache", "latents_source"), lambda: {"folder": Path("nowhere")},
        called={"folder": "there are no latents"},
    ),
    "make_image_processor": PublicCall(
        _public("d_emo.classification.transformers_models", "make_image_processor"), lambda: {"image_size": 32}
    ),
}  # fmt: skip


def _classifier_config() -> Any:
    from d_emo import EMOv2Config

    return EMOv2Config(**CLASSIFIER, image_size=32, num_labels=3)


def _segmenter_config() -> Any:
    from d_emo import EMOv2SegmentationConfig

    return EMOv2SegmentationConfig(_classifier_config(), head_channels=8, auxiliary_channels=8)


def _unet_config() -> Any:
    from d_emo import UEMOv2Config

    return UEMOv2Config(**UNET, num_labels=2)


def _video_config() -> Any:
    from d_emo import VEMOv2Config

    return VEMOv2Config(**CLASSIFIER, image_size=32, num_labels=3)


def _moments() -> Any:
    from d_emo.eval.fid.metrics import moments_of

    return moments_of(np.random.RandomState(0).randn(8, 3))
