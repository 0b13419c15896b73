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
from ssljax.losses.prototypes import (
    centred_softmax,
    cross_entropy,
    masked_cross_entropy,
    sinkhorn,
    swapped_cross_entropy,
    update_centre,
)
from ssljax.losses.redundancy import barlow_twins, covariance_penalty, koleo, variance_hinge, vicreg

__all__ = [
    "barlow_twins",
    "centred_softmax",
    "clip_softmax",
    "covariance_penalty",
    "cross_entropy",
    "debiased",
    "decoupled",
    "dots",
    "info_nce",
    "koleo",
    "l2_normalize",
    "masked_cross_entropy",
    "nt_xent",
    "sigmoid",
    "similarity_distillation",
    "sinkhorn",
    "sup_con",
    "swapped_cross_entropy",
    "update_centre",
    "variance_hinge",
    "vicreg",
]
