"""Losses: pure functions of arrays, in float32, that know nothing of models."""

from ssljax.losses.contrastive import (
    clip_softmax,
    debiased,
    decoupled,
    dots,
    info_nce,
    l2_normalize,
    nt_xent,
    sigmoid,
    similarity_distillation,
    sup_con,
)

__all__ = [
    "clip_softmax",
    "debiased",
    "decoupled",
    "dots",
    "info_nce",
    "l2_normalize",
    "nt_xent",
    "sigmoid",
    "similarity_distillation",
    "sup_con",
]
