"""On-device augmentation: pure JAX, batched, one key per row. `ops`: the operations; `recipes`: what methods use."""

from ssljax.views import ops
from ssljax.views.per_example import PerExample, Together
from ssljax.views.recipes import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    View,
    Views,
    byol,
    clip,
    evaluation,
    mae,
    moco_v2,
    multi_crop,
    simclr,
)

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PerExample",
    "Together",
    "View",
    "Views",
    "byol",
    "clip",
    "evaluation",
    "mae",
    "moco_v2",
    "multi_crop",
    "ops",
    "simclr",
]
