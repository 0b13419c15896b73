"""On-device augmentation: pure JAX, batched, one key per row. `ops`: the operations; `recipes`: what methods use."""

from ssljax.views import ops
from ssljax.views.per_example import PerExample, Together
from ssljax.views.recipes import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    byol,
    clip,
    evaluation,
    mae,
    moco_v2,
    multi_crop,
    rspnet,
    simclr,
    video_mae,
)
from ssljax.views.sounds import LogMel, audio_mae, crisscross_audio, spec_augment
from ssljax.views.view import View, Views

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "LogMel",
    "PerExample",
    "Together",
    "View",
    "Views",
    "audio_mae",
    "byol",
    "clip",
    "crisscross_audio",
    "evaluation",
    "mae",
    "moco_v2",
    "multi_crop",
    "ops",
    "rspnet",
    "simclr",
    "spec_augment",
    "video_mae",
]
