"""Few-shot classification of frozen features by ridge regression in closed form."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ssljax.evals.chunks import map_chunks, place
from ssljax.evals.classification import check_labelled, label_rank
from ssljax.losses import l2_normalize


def few_shot(
    train_x: Float[np.ndarray | Array, "n d"],
    train_y: Int[np.ndarray | Array, " n"],
    test_x: Float[np.ndarray | Array, "m d"],
    test_y: Int[np.ndarray | Array, " m"],
    *,
    classes: int,
    shots: Sequence[int] = (1, 5, 10),
    draws: int = 5,
    penalty: float = 0.3,
    seed: int = 0,
    chunk: int = 1024,
) -> dict[str, float]:
    """Accuracy of a least-squares classifier fitted to a few training rows per class, over random draws of them.

    With X the drawn rows, l2-normalised and centred, and Y their one-hot labels, centred, the weights W solve

        (X'X + lambda I) W = X'Y,   lambda = penalty * mean_i |x_i|^2,

    a ridge relative to the spread of the features, which differs widely between encoders. A class with fewer rows than
    asked for gives all it has.

    Returns, for every n of `shots`, the mean over draws of the top-1 accuracy, `fewshot{n}_top1`, and its standard
    deviation over draws, `fewshot{n}_std`.
    """
    check_labelled("few-shot, training set", train_x, train_y, classes)
    check_labelled("few-shot, test set", test_x, test_y, classes)
    train_x, train_y = np.asarray(jax.device_get(train_x)), np.asarray(jax.device_get(train_y)).astype(np.int32)
    result: dict[str, float] = {}
    for n in shots:
        hits = []
        for draw in range(draws):
            rows = draw_shots(np.random.default_rng((seed, n, draw)), train_y, n)
            model = _ridge(*place((train_x[rows], train_y[rows])), classes, penalty)
            ranks = map_chunks(lambda x, y, model=model: _ranks(model, x, y), test_x, test_y, chunk=chunk)
            hits.append(np.mean(ranks == 0))
        result |= {f"fewshot{n}_top1": float(np.mean(hits)), f"fewshot{n}_std": float(np.std(hits))}
    return result


def draw_shots(rng: np.random.Generator, labels: Int[np.ndarray, " n"], shots: int) -> Int[np.ndarray, " drawn"]:
    """Positions of `shots` random rows of each class (all rows of a class that has fewer), sorted by class."""
    order = np.lexsort((rng.random(len(labels)), labels))
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    return order[np.arange(len(labels)) - np.repeat(first, counts) < shots]


Ridge = tuple[Array, Array, Array]  # mean of the features [d], weights [d, classes], mean of the targets [classes]


@partial(jax.jit, static_argnums=(2, 3))
def _ridge(x: Float[Array, "s d"], y: Int[Array, " s"], classes: int, penalty: float) -> Ridge:
    x, targets = l2_normalize(x), jax.nn.one_hot(y, classes)
    center, level = jnp.mean(x, axis=0), jnp.mean(targets, axis=0)
    x, targets = x - center, targets - level
    ridge = penalty * jnp.mean(jnp.sum(x * x, axis=1)) + 1e-12  # positive even if all rows are the same
    with jax.default_matmul_precision("highest"):
        if len(x) < x.shape[1]:  # the same solution through the smaller matrix: X' (XX' + lambda I)^-1 Y
            dual = jax.scipy.linalg.solve(x @ x.T + ridge * jnp.eye(len(x)), targets, assume_a="pos")
            return center, x.T @ dual, level
        weights = jax.scipy.linalg.solve(x.T @ x + ridge * jnp.eye(x.shape[1]), x.T @ targets, assume_a="pos")
        return center, weights, level


@jax.jit
def _ranks(model: Ridge, x: Float[Array, "b d"], y: Int[Array, " b"]) -> Int[Array, " b"]:
    center, weights, level = model
    with jax.default_matmul_precision("highest"):
        return label_rank((l2_normalize(x) - center) @ weights + level, y)
