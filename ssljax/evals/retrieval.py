"""Retrieval between two modalities: recall at k, in both directions."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from ssljax.evals.chunks import fold_blocks, map_chunks, place
from ssljax.losses import dots, l2_normalize


def retrieval(
    image_x: Float[np.ndarray | Array, "n d"],
    text_x: Float[np.ndarray | Array, "m d"],
    *,
    image_id: Shaped[np.ndarray | Array, " n"],
    text_id: Shaped[np.ndarray | Array, " m"],
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """Recall at k by cosine: `i2t_r{k}` and `t2i_r{k}`, shares of queries with a match among their k nearest.

    An image and a text match when their ids (integers or strings) are equal, so an image may have several captions;
    the best placed one counts. Its rank is the number of non-matching items with a cosine no smaller: ties count
    against the model.

    Raises:
        ValueError: an image or a text without any match.
    """
    if len(image_x) != len(image_id) or len(text_x) != len(text_id):
        sizes = f"{len(image_x)} images, {len(image_id)} ids; {len(text_x)} texts, {len(text_id)} ids"
        raise ValueError(f"retrieval needs one id per row; got {sizes}")
    image_id, text_id = np.asarray(jax.device_get(image_id)), np.asarray(jax.device_get(text_id))
    for name, ids, others in (("image", image_id, text_id), ("text", text_id, image_id)):
        lonely = np.setdiff1d(ids, others)
        if len(lonely):
            raise ValueError(
                f"{len(lonely)} {name} id(s) have no match, such as {lonely[0]}; drop those rows before the evaluation"
            )
    _, codes = np.unique(np.concatenate([image_id, text_id]), return_inverse=True)
    codes = codes.astype(np.int32)
    image = jax.device_get(image_x), codes[: len(image_id)]
    text = jax.device_get(text_x), codes[len(image_id) :]

    result: dict[str, float] = {}
    for name, queries, gallery in (("i2t", image, text), ("t2i", text, image)):
        ranks = map_chunks(partial(_ranks, *place(gallery)), *queries, chunk=chunk)
        result |= {f"{name}_r{k}": float(np.mean(ranks < k)) for k in ks}
    return result


@jax.jit
def _ranks(gallery: Array, gallery_id: Array, queries: Array, query_id: Array) -> Int[Array, " q"]:
    """Rank of each query's best match, in two passes over the gallery: its cosine, then how many others reach it."""
    queries = l2_normalize(queries)

    def best_match(best: Array, rows: Array, index: Array, _: Array) -> Array:
        match = query_id[:, None] == gallery_id[index]
        return jnp.maximum(best, jnp.max(dots(queries, l2_normalize(rows)), axis=1, where=match, initial=-jnp.inf))

    def rivals(count: Array, rows: Array, index: Array, fresh: Array) -> Array:
        rival = fresh & (query_id[:, None] != gallery_id[index])
        return count + jnp.sum(~(dots(queries, l2_normalize(rows)) < best[:, None]), axis=1, where=rival)

    best = fold_blocks(best_match, jnp.full(len(queries), -jnp.inf), gallery)
    return fold_blocks(rivals, jnp.zeros(len(queries), jnp.int32), gallery)
