"""Losses: pure functions of arrays, in float32, that know nothing of models."""

from ssljax.losses.contrastive import clip_softmax, dots, info_nce, l2_normalize, nt_xent, sigmoid

__all__ = ["clip_softmax", "dots", "info_nce", "l2_normalize", "nt_xent", "sigmoid"]
