"""On-device augmentation: pure JAX, batched, one key per row. `ops`: the operations; `recipes`: what methods use."""

from ssljax.views import ops
from ssljax.views.graphs import GraphView, grace, graphcl
from ssljax.views.per_example import PerExample, Together
from ssljax.views.points import PointView, point_contrast, strl
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
from ssljax.views.volumes import VolumeView, swin_unetr

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "GraphView",
    "LogMel",
    "PerExample",
    "PointView",
    "Together",
    "View",
    "Views",
    "VolumeView",
    "audio_mae",
    "byol",
    "clip",
    "crisscross_audio",
    "evaluation",
    "grace",
    "graphcl",
    "mae",
    "moco_v2",
    "multi_crop",
    "ops",
    "point_contrast",
    "rspnet",
    "simclr",
    "spec_augment",
    "strl",
    "swin_unetr",
    "video_mae",
]
