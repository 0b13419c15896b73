"""Losses over a batch whose rows are spread over devices.

A contrastive loss is a mean over rows, and row i needs its own embeddings and everybody's: a function of (rows,
columns). On one device both are the batch: the dense form. On several, each device keeps its own rows and gathers the
columns, so that none ever holds the whole B x B table. One function per loss therefore describes both forms, and
`over_batch_shards` picks.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

BATCH_AXES = ("replica", "fsdp")  # mesh axes over which the rows of a batch are split

Rows = tuple[Array, ...]  # embeddings [rows, dim] that belong together row by row


def batch_axes() -> tuple[str, ...]:
    """The axes of the context mesh (`jax.set_mesh`) that split a batch over more than one device; () without a mesh.

    Axes that are manual already (the caller is inside a `shard_map`) do not count: there the rows at hand are the
    batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1 and axis not in mesh.manual_axes)


def batch_shards() -> int:
    """Into how many parts the rows of a batch are split under the context mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in batch_axes())


def over_batch_shards(
    row_losses: Callable[..., Float[Array, " b"]], rows: Rows, *shared: Array | float
) -> Float[Array, ""]:
    """The mean over the global batch of `row_losses(rows, columns, index, *shared)`.

    Args:
        row_losses: one loss per row, from the rows at hand (arrays [b, d]), the columns (the same arrays for the
            whole batch, [B, d]), the rows' positions among the columns (int32 [b]) and `shared`. It must not take
            gradients itself: inside `shard_map` they would miss the other devices' terms.
        rows: arrays [B, d], row i of each belonging to example i.
        shared: floats or arrays that every device has in full (temperature, scale, bias); they get gradients too.

    Raises:
        ValueError: the arrays differ in length, or the batch does not divide over the mesh.
    """
    size = len(rows[0])
    if any(len(x) != size for x in rows):
        raise ValueError(f"paired embeddings must have one row per example each; got {[len(x) for x in rows]} rows")
    axes = batch_axes()
    if not axes:
        return row_losses(rows, rows, jnp.arange(size), *shared).mean()

    shards = batch_shards()
    if size % shards:
        low = size // shards * shards
        sizes = f"{low} or {low + shards}" if low else f"{shards}"
        raise ValueError(f"batch {size} is not divisible by the {shards} data shards of the mesh; use {sizes}")

    def of_shard(rows: Rows, shared: Sequence[Array]) -> Array:
        columns = jax.lax.all_gather(rows, axes, tiled=True)
        index = jax.lax.axis_index(axes) * (size // shards) + jnp.arange(size // shards)
        return jax.lax.pmean(row_losses(rows, columns, index, *shared).mean(), axes)

    in_specs = (PartitionSpec(axes), PartitionSpec())
    # check_vma makes the transposes of the gather and of the replicated scalars sum over devices.
    mean = jax.shard_map(of_shard, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=True)
    return mean(rows, tuple(jnp.asarray(x, jnp.float32) for x in shared))
