"""From images to features: Inception as ADM's evaluator has it, CLIP, DINOv2, any backbone of transformers, pixels.

Every extractor takes uint8 images (n, C, H, W) and answers float32 features by layer: `pool` (n, D) for all; Inception
also `spatial` (n, 2023) for sFID and `logits` (n, 1008) for the Inception Score.

Source: the layers of ADM's graph (github.com/openai/guided-diffusion, evaluations/evaluator.py at 22e0df8), on
torch-fidelity's port of that graph's weights.
"""

import contextlib
import hashlib
import pickle
import re
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from d_emo.common import checks
from d_emo.common.digests import weights_digest
from d_emo.common.files import file_digest, remove
from d_emo.common.messages import first_line
from d_emo.common.saved_folders import LOADING_ERRORS

INCEPTION, PIXELS, FD_DINOV2 = "inception", "pixels", "fd-dinov2"
# The literature's FD-DINOv2 (arXiv 2306.04675; layer6ai-labs/dgm-eval, dgm_eval/models/dinov2.py): ViT-L/14's class
# token after the last norm, of images resized to 224 x 224 by PIL's bicubic filter, not cropped.
DINOV2_LARGE, DINOV2_SIDE = "facebook/dinov2-large", 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# torch-fidelity's names behind the short ones.
FIDELITY_NAMES = {"clip": "clip-vit-b-32", "dinov2": "dinov2-vit-s-14"}
NAMES = (INCEPTION, FD_DINOV2, *FIDELITY_NAMES, PIXELS)
# mixed_6/conv of ADM's graph: 17 x 17 positions, of which the evaluator takes 7 channels.
SPATIAL_CHANNELS = 7
# A covariance of more features would not fit in memory, nor be known from any number of images at hand.
MAX_PIXEL_FEATURES = 4096


class FeatureExtractor:
    """What all extractors share.

    Attributes:
        name: what the user typed.
        layers: names of what it answers.
        identity: hash of its weights and preprocessing; features are cached under it.
        published: whether these are the features of the literature's FID.
    """

    name: str
    layers: tuple[str, ...] = ("pool",)
    identity: str
    published = False

    def to(self, device: torch.device) -> "FeatureExtractor":
        """Move to a device; answers itself."""
        raise NotImplementedError

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features by layer, float32 on the CPU, of uint8 images (n, C, H, W)."""
        raise NotImplementedError


class InceptionExtractor(FeatureExtractor):
    """Inception-v3 of 2015-12-05, TensorFlow's resize, float32.

    Args:
        weights: file of torch-fidelity's weights; None takes the copy in torch's cache, or downloads it.
        verify: refuse a file of other weights. Without it scores are marked as not comparable.

    Raises:
        ValueError: the weights are missing or are not those.
    """

    layers = ("pool", "spatial", "logits")

    def __init__(self, weights: str | None = None, verify: bool = True):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = Path(weights) if weights else inception_path()
        digest = checked_digest(path, inception_hash() if verify else None)
        self.name, self.identity, self.published = INCEPTION, f"{INCEPTION}-{digest}", verify
        try:
            self.network = FeatureExtractorInceptionV3(
                INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except LOADING_ERRORS as error:
            raise ValueError(f"--inception-weights {path}: of another network ({first_line(error)}).") from error
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, _module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        # ADM flattens NHWC; NCHW would give another number.
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def to(self, device: torch.device) -> "InceptionExtractor":
        """Move to a device."""
        # On a CPU channels last is twice as fast; the memory's order changes no formula.
        self.network.to(device, memory_format=torch.channels_last if device.type == "cpu" else torch.preserve_format)
        return self

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pooled (n, 2048), spatial (n, 2023) and unbiased logits (n, 1008)."""
        device = next(self.network.parameters()).device
        with full_precision(device):
            pool, logits = self.network(as_rgb(images).to(device))
        return {"pool": pool.cpu(), "spatial": self._spatial.float().cpu(), "logits": logits.cpu()}


class FidelityExtractor(FeatureExtractor):
    """torch-fidelity's CLIP and DINOv2."""

    def __init__(self, name: str):
        from torch_fidelity.utils import create_feature_extractor

        long_name = FIDELITY_NAMES[name]
        try:
            self.network = create_feature_extractor(long_name, [name], cuda=False, verbose=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"--features {name}: torch-fidelity cannot fetch {long_name} ({first_line(error)}). Fetch it once "
                f"where there is a network (its cache is {torch.hub.get_dir()}), or use --features with the folder of "
                "a transformers model."
            ) from error
        self.name, self.identity = name, f"{long_name}-{weights_digest(self.network)}"

    def to(self, device: torch.device) -> "FidelityExtractor":
        """Move to a device."""
        self.network.to(device)
        return self

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The image's embedding."""
        device = next(self.network.parameters()).device
        with full_precision(device):
            (pool,) = self.network(as_rgb(images).to(device))
        return {"pool": pool.float().cpu()}


class TransformersExtractor(FeatureExtractor):
    """The pooled features of any image backbone of transformers, prepared by its own image processor.

    Args:
        name: Hub id or folder.
    """

    def __init__(self, name: str):
        from transformers import AutoImageProcessor, AutoModel

        try:
            self.processor = AutoImageProcessor.from_pretrained(name)
            self.network = AutoModel.from_pretrained(name).eval().requires_grad_(False)
        except LOADING_ERRORS as error:
            raise ValueError(
                f"--features {name}: neither one of {', '.join(NAMES)} nor an image model of transformers in a folder "
                f"or on the Hub ({first_line(error)})."
            ) from error
        processor = hashlib.sha256(repr(sorted(self.processor.to_dict().items(), key=str)).encode()).hexdigest()
        self.name, self.identity = name, f"{weights_digest(self.network)}-{processor}"

    def to(self, device: torch.device) -> "TransformersExtractor":
        """Move to a device."""
        self.network.to(device)
        return self

    def prepared(self, images: torch.Tensor) -> torch.Tensor:
        """What the network takes, of uint8 images (n, C, H, W)."""
        return self.processor(images=list(as_rgb(images)), return_tensors="pt")["pixel_values"]

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's pooled output, or the mean over positions where it has none."""
        prepared = self.prepared(images)
        with full_precision(self.network.device):
            output = self.network(prepared.to(self.network.device))
        pool = getattr(output, "pooler_output", None)
        if pool is None:
            hidden = output.last_hidden_state  # (n, L, D) or (n, D, h, w)
            pool = hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))
        return {"pool": pool.flatten(1).float().cpu()}


class DINOv2Extractor(TransformersExtractor):
    """The features of FD-DINOv2, by the weights that transformers has of DINOv2 ViT-L/14.

    Its image processor would resize to 256 and crop 224; the published metric resizes to 224 alone.
    """

    def __init__(self) -> None:
        try:
            super().__init__(DINOV2_LARGE)
        except ValueError as error:
            raise ValueError(
                f"--features {FD_DINOV2}: {DINOV2_LARGE} cannot be opened ({first_line(error.__cause__ or error)}). "
                "Fetch it once where there is a network (Hugging Face keeps it), or leave these features out."
            ) from error
        self.name, self.identity = FD_DINOV2, f"{FD_DINOV2}-{weights_digest(self.network)}"

    def prepared(self, images: torch.Tensor) -> torch.Tensor:
        """Resized by PIL, which rounds to 8 bits, then normalised."""
        resized = [
            np.asarray(PIL.Image.fromarray(image).resize((DINOV2_SIDE, DINOV2_SIDE), PIL.Image.Resampling.BICUBIC))
            for image in as_rgb(images).permute(0, 2, 3, 1).contiguous().numpy()
        ]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
        return (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


class PixelExtractor(FeatureExtractor):
    """The pixels themselves in [0, 1]: no weights, for small images such as the digits."""

    name, identity = PIXELS, PIXELS

    def to(self, device: torch.device) -> "PixelExtractor":
        """Nothing to move."""
        return self

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(n, C * H * W)."""
        pool = images.flatten(1).float() / 255
        if pool.shape[1] > MAX_PIXEL_FEATURES:
            raise ValueError(
                f"--features pixels: images of {tuple(images.shape[1:])} have {pool.shape[1]:,} values, more than "
                f"{MAX_PIXEL_FEATURES:,}; use another extractor."
            )
        return {"pool": pool}


def make_extractor(name: str, inception_weights: str | None = None, verify: bool = True) -> FeatureExtractor:
    """The extractor of a name: one of `NAMES`, or an image model of transformers.

    Raises:
        ValueError: unknown, its package or weights are missing, or the weights are not those of the literature.
    """
    name = checks.text(name, "--features")
    if name == PIXELS:
        return PixelExtractor()
    try:
        if name == INCEPTION:
            return InceptionExtractor(inception_weights, verify)
        if name == FD_DINOV2:
            return DINOv2Extractor()
        return FidelityExtractor(name) if name in FIDELITY_NAMES else TransformersExtractor(name)
    except ImportError as error:
        raise ValueError(f"--features {name} needs {error.name or error}: pip install 'd-emo[eval]'.") from error


def inception_url() -> str:
    """Where torch-fidelity's weights are."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return URL_INCEPTION_V3


def inception_hash() -> str:
    """The first eight digits of the file's SHA-256, which its name carries."""
    found = re.search(r"-([0-9a-f]{8})\.pth$", inception_url())
    assert found, inception_url()
    return found.group(1)


def inception_path() -> Path:
    """The weights in torch's cache, downloaded if they are not there, or are damaged.

    Raises:
        ValueError: no network; the message says what to fetch and where to put it.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / inception_url().rsplit("/", 1)[1]
    if path.is_file() and file_digest(path).startswith(inception_hash()):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            remove(path)
        torch.hub.download_url_to_file(inception_url(), str(path), hash_prefix=inception_hash())
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise ValueError(
            f"the Inception weights are not on this machine, or damaged, and cannot be fetched ({first_line(error)}). "
            f"Fetch {inception_url()} (its SHA-256 begins with {inception_hash()}), then pass --inception-weights FILE "
            f"or put it at {path}. --features pixels needs no weights."
        ) from error
    return path


def checked_digest(path: Path, prefix: str | None) -> str:
    """SHA-256 of a file of weights.

    Raises:
        ValueError: it is missing, is no plain file of tensors, or begins with other digits than `prefix`.
    """
    if not path.is_file():
        raise ValueError(f"--inception-weights {path}: there is no such file.")
    digest = file_digest(path)
    if prefix and not digest.startswith(prefix):
        raise ValueError(
            f"--inception-weights {path}: its SHA-256 begins with {digest[:8]}, not {prefix}: it is another or a "
            f"damaged file. Fetch {inception_url()} again."
        )
    if not prefix:
        try:
            torch.load(path, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"--inception-weights {path}: not a file of tensors ({first_line(error)}).") from error
    return digest


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    """Grey images (n, 1, H, W) as (n, 3, H, W)."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, autocast or TF32: TF32, which cuDNN uses by default, moves features by half a percent."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
