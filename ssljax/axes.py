"""Names of the mesh axes, and what the context mesh (`jax.set_mesh`) says of the rows of a batch."""

import math

import jax

AXES = ("replica", "fsdp", "tensor")
BATCH = ("replica", "fsdp")  # the rows of a batch are split over these


def batch_axes() -> tuple[str, ...]:
    """The axes of the context mesh that split a batch over more than one device; () without a mesh.

    Axes that are manual already (the caller is inside a `shard_map`) do not count: there the rows at hand are the
    batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in BATCH if mesh.shape.get(axis, 1) > 1 and axis not in mesh.manual_axes)


def batch_shards() -> int:
    """Into how many parts the rows of a batch are split under the context mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in batch_axes())
