"""Weighted k-nearest-neighbour classification of frozen features, and exact nearest neighbours."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ssljax.evals.chunks import fold_blocks, map_chunks, place
from ssljax.evals.classification import accuracies, check_labelled, label_rank
from ssljax.losses import dots, l2_normalize


def nearest(
    bank: Float[np.ndarray | Array, "n d"], queries: Float[np.ndarray | Array, "q d"], k: int, *, chunk: int = 1024
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """The `k` rows of `bank` with the largest cosine to each query, exactly, nearest first.

    Returns the cosines and the positions in the bank; equal cosines are in the order of the bank. With fewer than `k`
    rows in the bank, all of them come back. A query that is itself in the bank finds itself first.
    """
    k = min(k, len(bank))
    bank = place(bank)
    return map_chunks(lambda x: _nearest(bank, x, k), queries, chunk=chunk)


def knn(
    train_x: Float[np.ndarray | Array, "n d"],
    train_y: Int[np.ndarray | Array, " n"],
    test_x: Float[np.ndarray | Array, "m d"],
    test_y: Int[np.ndarray | Array, " m"],
    *,
    classes: int,
    k: Sequence[int] = (20,),
    temperature: float = 0.07,
    chunk: int = 1024,
) -> dict[str, float]:
    """Accuracy of the weighted k-NN vote (Wu et al., 2018, sec. 3.4; as in DINO: Caron et al., 2021).

    Each of the k training rows with the largest cosine s to a test row votes for its class with weight exp(s /
    temperature). Returns `knn{k}_top1` and, from five classes on, `knn{k}_top5` for every k; a k beyond the training
    set lets all of it vote.
    """
    check_labelled("k-NN, training set", train_x, train_y, classes)
    check_labelled("k-NN, test set", test_x, test_y, classes)
    bank, labels = place((train_x, train_y))
    sizes = tuple(min(n, len(bank)) for n in k)
    ranks = map_chunks(lambda x, y: _vote(bank, labels, x, y, sizes, classes, temperature), test_x, test_y, chunk=chunk)
    result: dict[str, float] = {}
    for i, n in enumerate(k):
        result |= accuracies(f"knn{n}", ranks[:, i], classes)
    return result


@partial(jax.jit, static_argnums=2)
def _nearest(bank: Array, queries: Array, k: int) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    queries = l2_normalize(queries)

    def step(best: tuple[Array, Array], rows: Array, index: Array, fresh: Array) -> tuple[Array, Array]:
        similarity = jnp.where(fresh, dots(queries, l2_normalize(rows)), -jnp.inf)
        similarity, column = jax.lax.top_k(similarity, min(k, len(index)))
        # The best so far come first, and top_k prefers the first of equals: ties keep the bank's order.
        merged = jnp.concatenate([best[0], similarity], axis=1), jnp.concatenate([best[1], index[column]], axis=1)
        similarity, column = jax.lax.top_k(merged[0], k)
        return similarity, jnp.take_along_axis(merged[1], column, axis=1)

    start = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
    return fold_blocks(step, start, bank)


@partial(jax.jit, static_argnums=(4, 5, 6))
def _vote(
    bank: Array, bank_y: Array, x: Array, y: Array, sizes: tuple[int, ...], classes: int, temperature: float
) -> Int[Array, "q sizes"]:
    """Rank of the true class in the vote of each size."""
    similarity, index = _nearest(bank, x, max(sizes))
    votes = bank_y[index]
    weight = jnp.exp((similarity - similarity[:, :1]) / temperature)  # relative to the nearest: cannot overflow
    count = jax.vmap(lambda votes, weight: jnp.zeros(classes).at[votes].add(weight))
    return jnp.stack([label_rank(count(votes[:, :n], weight[:, :n]), y) for n in sizes], axis=1)
