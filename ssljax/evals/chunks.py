"""Large sets in pieces of one static shape: chunks of queries from the host, blocks of a bank on the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ssljax.axes import batch_axes, batch_shards

BLOCK = 8192  # rows of a bank that a chunk of queries meets at a time: a table of 1024 x 8192 float32 takes 32 MiB


def place(tree: Any, axis: int | None = None) -> Any:
    """Puts arrays on the devices of the context mesh: whole on each, or split along `axis` where that divides evenly.

    All processes must bring the same host arrays. Without a mesh the arrays go to the default device.
    """
    mesh, axes = jax.sharding.get_mesh(), batch_axes()
    if mesh.empty:
        return jax.device_put(tree)

    def sharding(x: np.ndarray | Array) -> NamedSharding:
        if axis is None or x.shape[axis] % batch_shards():
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, axes))

    return jax.device_put(tree, jax.tree.map(sharding, tree))


def map_chunks(fn: Callable[..., Any], *rows: np.ndarray | Array, chunk: int) -> Any:
    """`fn(*rows)` in chunks of about `chunk` rows, put together on the host.

    `fn` (jitted) takes arrays of equally many rows, spread over the devices of the mesh, and gives a tree of arrays
    with one entry per row. The last chunk is filled up with zeros, whose results are dropped: `fn` is compiled once.
    """
    host = [np.asarray(jax.device_get(x)) for x in rows]
    size = len(host[0])
    if not size or any(len(x) != size for x in host):
        raise ValueError(f"an evaluation needs equally many rows in each array, and some; got {[len(x) for x in host]}")
    shards = batch_shards()
    chunk = -(-min(chunk, size) // shards) * shards
    results = []
    for start in range(0, size, chunk):
        count = min(chunk, size - start)
        parts = [np.pad(x[start : start + count], [(0, chunk - count)] + [(0, 0)] * (x.ndim - 1)) for x in host]
        result = jax.device_get(place(fn(*place(parts, axis=0))))
        results.append(jax.tree.map(lambda x, n=count: x[:n], result))
    return jax.tree.map(lambda *x: np.concatenate(x), *results)


def fold_blocks(
    step: Callable[[Any, Float[Array, "block d"], Int[Array, " block"], Bool[Array, " block"]], Any],
    carry: Any,
    bank: Float[Array, "n d"],
) -> Any:
    """Folds `step(carry, rows, index, fresh)` over blocks of `bank`; memory does not grow with the bank.

    `index` are the rows' positions in the bank. The last block is a full one that ends with the bank: its rows that
    an earlier block has had already are not `fresh`.
    """
    size = len(bank)
    block = min(BLOCK, size)

    def body(i: Array, carry: Any) -> Any:
        start = jnp.minimum(i * block, size - block)
        index = start + jnp.arange(block)
        return step(carry, jax.lax.dynamic_slice_in_dim(bank, start, block), index, index >= i * block)

    return jax.lax.fori_loop(0, -(-size // block), body, carry)
