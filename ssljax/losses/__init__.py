"""Losses: pure functions of arrays, in float32, that know nothing of models."""

from ssljax.losses.contrastive import clip_softmax, dots, info_nce, l2_normalize, nt_xent, sigmoid
from ssljax.losses.prototypes import (
    centred_softmax,
    cross_entropy,
    masked_cross_entropy,
    sinkhorn,
    swapped_cross_entropy,
    update_centre,
)
from ssljax.losses.redundancy import barlow_twins, covariance_penalty, koleo, variance_hinge, vicreg

__all__ = ["clip_softmax", "dots", "info_nce", "l2_normalize", "nt_xent", "sigmoid"]
__all__ += ["centred_softmax", "cross_entropy", "masked_cross_entropy"]
__all__ += ["sinkhorn", "swapped_cross_entropy", "update_centre"]
__all__ += ["barlow_twins", "covariance_penalty", "koleo", "variance_hinge", "vicreg"]
