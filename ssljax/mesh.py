"""The device mesh, and where each array lives on it.

Axes: `replica` (plain data parallelism), `fsdp` (data parallelism with sharded parameters) and `tensor` (tensor
parallelism of transformer blocks). Batches are split over replica and fsdp. Parameters, optimiser moments and method
state are placed by one rule over names and shapes, so a moment or a teacher always lies where its parameter lies.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssljax.axes import AXES, BATCH
from ssljax.rules import leaf_name

# Aligned to a leaf's last dimensions, so scanned stacks (a leading depth axis) match too.
TENSOR_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attn/(query|key|value)/kernel$", (None, "tensor", None)),  # [width, heads, head_dim]: split heads
    (r"attn/(query|key|value)/bias$", ("tensor", None)),
    (r"attn/out/kernel$", ("tensor", None, None)),
    (r"mlp/fc1/kernel$", (None, "tensor")),
    (r"mlp/fc1/bias$", ("tensor",)),
    (r"mlp/fc2/kernel$", ("tensor", None)),
)


@dataclass(frozen=True)
class Mesh:
    """Shape of the device mesh; one axis may be -1, the rest of the devices."""

    replica: int = -1
    fsdp: int = 1
    tensor: int = 1
    min_size: int = 2**16  # smaller parameters are replicated over fsdp: gathering them costs more than they take

    def create(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
        """The jax mesh over `devices` (all devices of all processes by default)."""
        devices = jax.devices() if devices is None else devices
        sizes = [self.replica, self.fsdp, self.tensor]
        if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise ValueError(
                f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, and at most one is -1 (the rest)"
            )
        fixed = math.prod(s for s in sizes if s != -1)
        rest = len(devices) // fixed
        sizes = [rest if s == -1 else s for s in sizes]
        if math.prod(sizes) != len(devices):
            raise ValueError(
                f"mesh {dict(zip(AXES, sizes, strict=True))} does not fill {len(devices)} device(s); "
                f"choose sizes whose product is {len(devices)}, or -1 for one of them"
            )
        # jax.make_mesh makes Explicit axes by default; the compiler is to propagate shardings here.
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec_of(name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh, min_size: int) -> PartitionSpec:
    """Where a leaf lives: its tensor-parallel rule, then fsdp on the largest free dimension that divides evenly."""
    spec: list[str | None] = [None] * len(shape)
    if mesh.shape["tensor"] > 1:
        for pattern, tail in TENSOR_RULES:
            if re.search(pattern, name) and len(tail) <= len(shape):
                axis = len(shape) - len(tail) + tail.index("tensor")
                if shape[axis] % mesh.shape["tensor"] == 0:
                    spec[axis] = "tensor"
    fsdp = mesh.shape["fsdp"]
    if fsdp > 1 and math.prod(shape) >= min_size:
        free = [i for i, n in enumerate(shape) if spec[i] is None and n % fsdp == 0]
        if free:
            spec[max(free, key=lambda i: shape[i])] = "fsdp"
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def shardings(tree: Any, mesh: jax.sharding.Mesh, min_size: int) -> Any:
    """A `NamedSharding` for every leaf of `tree` (arrays or shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_of(leaf_name(path), x.shape, mesh, min_size)), tree
    )


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree` with `shardings`, placed but not there yet."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows of the global batch over the replica and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def data_shards(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def check_batch_size(batch_size: int, mesh: jax.sharding.Mesh, micro_batches: int = 1) -> None:
    """Raises if the rows of a batch (of each micro-batch) do not divide over the mesh, naming sizes that do."""
    n = data_shards(mesh) * micro_batches
    if batch_size % n:
        low = batch_size // n * n
        sizes = f"{low} or {low + n}" if low else f"{n}"
        parts = f" times {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise ValueError(
            f"batch size {batch_size} is not divisible by the {data_shards(mesh)} data shards of the mesh{parts}; "
            f"use {sizes}"
        )


def process_rows(batch_size: int, mesh: jax.sharding.Mesh) -> np.ndarray:
    """The rows of the global batch that this process has to read, in order.

    On a TPU slice they are several blocks: the mesh follows the wires between chips, and a host owns a square of those.
    """
    index_maps = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    spans = sorted({index[0].indices(batch_size)[:2] for index in index_maps if index is not None})
    return np.concatenate([np.arange(start, stop) for start, stop in spans])


def global_batch(batch: dict[str, np.ndarray], batch_size: int, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Places this process's rows (numpy, from `process_rows`) as arrays of the global batch."""
    sharding = batch_sharding(mesh)
    # With several processes jax counts this as an implicit transfer, although nothing could be more explicit.
    with jax.transfer_guard("allow"):
        return {
            name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
            for name, rows in batch.items()
        }
