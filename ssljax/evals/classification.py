"""What all classifiers of frozen features share: a check of their inputs, and top-1 / top-5 accuracy from ranks."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def label_rank(scores: Float[Array, "*b classes"], label: Int[Array, "*b"]) -> Int[Array, "*b"]:
    """How many other classes score no less than the true one; 0 is a hit at 1.

    Ties (and scores that are not numbers) count against the classifier, so features that are all the same score zero.
    """
    own = jnp.take_along_axis(scores, label[..., None], axis=-1)
    return jnp.sum(~(scores < own), axis=-1) - 1


def accuracies(name: str, ranks: Int[np.ndarray, " n"], classes: int) -> dict[str, float]:
    """`{name}_top1` and, from five classes on, `{name}_top5`: shares of ranks below 1 and 5."""
    return {f"{name}_top{k}": float(np.mean(ranks < k)) for k in (1, 5) if k <= classes}


def check_labelled(name: str, x: np.ndarray | Array, y: np.ndarray | Array, classes: int) -> None:
    """Raises unless there is one label below `classes` for each row of features."""
    labels = np.asarray(jax.device_get(y))
    if x.ndim != 2 or labels.shape != x.shape[:1] or not len(labels):
        raise ValueError(f"{name}: needs features [n, d] and labels [n] with n > 0, got {x.shape} and {labels.shape}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{name}: labels run from {labels.min()} to {labels.max()}, outside 0..{classes - 1}; "
            "drop unlabelled rows and pass the full number of classes"
        )
