"""The sweep over a table of similarities whose rows are spread over devices, and its gradient.

Each device keeps its rows of the one tower and meets every row of the other: the *gather* form fetches them once and
sums the gradients of the fetched tower with one reduce-scatter; the *ring* form passes blocks from device to device,
each block's gradients travelling with it, so that no device ever holds a whole tower. Column statistics are combined
by a psum of a few numbers per column. A tower compared with itself is symmetric, and needs no reduce-scatter at all.

Which form: gather while the fetched tower and its float32 gradient stay below `GATHER_LIMIT`, else the ring.

The gradient is written out, a `jax.custom_vjp` around the `shard_map`s: autodiff of the sweep would store every tile.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from ssljax.axes import batch_axes, batch_shards
from ssljax.losses import sweep
from ssljax.losses.sweep import Law, Results, Tower

GATHER_LIMIT = 2**30  # bytes: of a gathered tower and its gradient, on each device
# Rows (and columns) of a tile: 4 MiB of logits stay in the cache of a CPU; accelerators want more work per step.
TILE = {"cpu": 1024, "default": 4096}
# Pallas instead of XLA's loop on TPUs: two products more, less traffic to HBM. Off: XLA keeps a tile of 64 MiB in the
# fast memory of a v5e as well, and no TPU was at hand to measure which form wins.
TPU_KERNELS = False
KERNEL_TILE = 1024


class Layout(NamedTuple):
    """How the rows lie on the devices, and what the columns are."""

    axes: tuple[str, ...]  # mesh axes over which the rows are spread; () on one device
    columns: Literal["pairs", "itself", "bank"]
    ring: bool


def statistics(law: Law, rows: Tower, columns: Tower | None = None, bias: Any = None, *, bank: bool = False) -> tuple:
    """What `law` sums over the table of `rows` against `columns`: (its result for the rows, for the columns or None).

    Args:
        law: see `ssljax.losses.laws`.
        rows: B rows of the global batch.
        columns: B rows that belong to `rows` one by one; with `bank` any number of others; None: the rows themselves,
            which get their `position` here.
        bias: added to all logits.

    Gradients reach `x` and `factor` of both towers and `bias`.

    Raises:
        ValueError: the towers differ in length, or the batch does not divide over the mesh.
    """
    size = len(rows.x)
    if columns is None:
        rows = rows._replace(position=jnp.arange(size, dtype=jnp.int32))
    elif not bank and len(columns.x) != size:
        raise ValueError(f"paired embeddings must have one row per example each; got {size} and {len(columns.x)} rows")
    axes, shards = batch_axes(), batch_shards()
    if size % shards:
        low = size // shards * shards
        sizes = f"{low} or {low + shards}" if low else f"{shards}"
        raise ValueError(f"batch {size} is not divisible by the {shards} data shards of the mesh; use {sizes}")
    gathered = rows if columns is None else columns
    ring = bool(axes) and not bank and gathered.x.size * (4 + gathered.x.dtype.itemsize) > GATHER_LIMIT
    if bias is not None:
        bias = jnp.asarray(bias, jnp.float32)
    kind = "bank" if bank else "itself" if columns is None else "pairs"
    return _statistics(law, Layout(axes, kind, ring), rows, columns, bias)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _statistics(law: Law, layout: Layout, rows: Tower, columns: Tower | None, bias: Array | None) -> tuple:
    return _forward(law, layout, rows, columns, bias)[0]


def _forward(law: Law, layout: Layout, rows: Tower, columns: Tower | None, bias: Array | None) -> tuple[Any, Any]:
    split, whole = PartitionSpec(layout.axes), PartitionSpec()
    against = rows if columns is None else columns
    if not layout.axes:
        stats = _sweep_forward(law, rows, against, bias)
        results = law.finish(stats[0]), law.finish(stats[1])
    elif layout.ring:
        of_shard = _shard_map(partial(_ring_forward, law, layout.axes), in_specs=(split, split, whole), out_specs=split)
        results = of_shard(rows, against, bias)
    else:
        # Gathered out here, not in `shard_map`, and kept: the backward pass needs no second gather.
        if layout.columns != "bank":
            against = jax.lax.with_sharding_constraint(against, whole)

        def of_shard(rows: Tower, columns: Tower, bias: Array | None) -> tuple:
            row_stats, column_stats = _sweep_forward(law, rows, columns, bias)
            return law.finish(row_stats), law.finish(sweep.merge_over(layout.axes, column_stats))

        results = _shard_map(of_shard, in_specs=(split, whole, whole), out_specs=(split, whole))(rows, against, bias)
    return results, (rows, against, bias, results)


def _backward(law: Law, layout: Layout, saved: tuple, cotangents: tuple) -> tuple:
    rows, columns, bias, results = saved
    split, whole = PartitionSpec(layout.axes), PartitionSpec()
    of_rows, of_columns = (Results(*both) for both in zip(results, cotangents, strict=True))
    itself = layout.columns == "itself"
    if itself:  # the table is symmetric: a row is also a column, and the row's gradient is all
        of_columns = of_rows
    if not layout.axes:
        gradients = _sweep_backward(law, not itself, rows, columns, bias, of_rows, of_columns)
    elif layout.ring:
        gradients = _shard_map(
            partial(_ring_backward, law, layout.axes, itself),
            in_specs=(split, split, whole, split, split),
            out_specs=(split, split, whole),
        )(rows, columns, bias, of_rows, of_columns)
    else:

        def of_shard(*arguments: Any) -> tuple:
            d_rows, d_columns, d_bias = _sweep_backward(law, not itself, *arguments)
            if layout.columns == "bank":
                d_columns = jax.lax.psum(d_columns, layout.axes)
            elif not itself:
                d_columns = jax.lax.psum_scatter(d_columns, layout.axes, tiled=True)
            return d_rows, d_columns, jax.lax.psum(d_bias, layout.axes)

        gradients = _shard_map(
            of_shard,
            in_specs=(split, whole, whole, split, whole),
            out_specs=(split, whole if layout.columns == "bank" else split, whole),
        )(rows, columns, bias, of_rows, of_columns)
    d_rows, d_columns, d_bias = gradients
    return _cotangent(rows, d_rows), None if itself else _cotangent(columns, d_columns), d_bias


_statistics.defvjp(_forward, _backward)


def _cotangent(tower: Tower, dx: Array) -> Tower:
    """Gradients of `x` at a fixed factor, and of the factor: the logits are linear in both."""
    d_factor = jnp.sum(tower.x.astype(jnp.float32) * dx, axis=-1) / tower.factor
    none = jax.tree.map(lambda x: None, tower)
    return none._replace(x=dx.astype(tower.x.dtype), factor=d_factor)


def _shard_map(function: Any, *, in_specs: Any, out_specs: Any) -> Any:
    # Pallas kernels do not say over which axes their results vary. Nothing is differentiated through these maps.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=not TPU_KERNELS)


def _kernels(rows: Tower, columns: Tower) -> Any:
    """The module of the kernels, where they are on and fit."""
    if not TPU_KERNELS:
        return None
    from ssljax.losses import kernels  # Pallas is slow to import

    return kernels if kernels.fits(rows, columns) else None


def _sweep_forward(law: Law, rows: Tower, columns: Tower, bias: Array | None) -> tuple:
    forms = {name: partial(sweep.forward, law, tile=tile) for name, tile in TILE.items()}
    if (kernels := _kernels(rows, columns)) is not None:
        forms["tpu"] = partial(kernels.forward, law, tile=KERNEL_TILE)
    return jax.lax.platform_dependent(rows, columns, bias, **forms)


def _sweep_backward(law: Law, both: bool, rows: Tower, columns: Tower, *others: Any) -> tuple:
    forms = {name: partial(sweep.backward, law, tile=tile, column_gradient=both) for name, tile in TILE.items()}
    if (kernels := _kernels(rows, columns)) is not None:
        forms["tpu"] = partial(kernels.backward, law, tile=KERNEL_TILE, column_gradient=both)
    return jax.lax.platform_dependent(rows, columns, *others, **forms)


# The ring: blocks of columns visit every device. The next one is under way while the sweep works on this one.


def _pass_on(axes: tuple[str, ...], tree: Any) -> Any:
    n = jax.lax.axis_size(axes)
    ring = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, ring), tree)


def _ring_forward(law: Law, axes: tuple[str, ...], rows: Tower, columns: Tower, bias: Array | None) -> tuple:
    like = jax.eval_shape(partial(_sweep_forward, law), rows, columns, bias)

    def visit(carry: tuple, _: None) -> tuple:
        row_stats, columns, column_stats = carry
        coming = _pass_on(axes, columns)
        of_block = _sweep_forward(law, rows, columns, bias)
        row_stats, column_stats = sweep.merge(row_stats, of_block[0]), sweep.merge(column_stats, of_block[1])
        return (row_stats, coming, _pass_on(axes, column_stats)), None

    start = sweep.nothing(like, rows.factor, columns.factor)
    (row_stats, _, column_stats), _ = jax.lax.scan(visit, (start[0], columns, start[1]), length=jax.lax.axis_size(axes))
    return law.finish(row_stats), law.finish(column_stats)


def _ring_backward(
    law: Law,
    axes: tuple[str, ...],
    itself: bool,
    rows: Tower,
    columns: Tower,
    bias: Array | None,
    of_rows: Results,
    of_columns: Results,
) -> tuple:
    like = jax.eval_shape(partial(_sweep_backward, law, not itself), rows, columns, bias, of_rows, of_columns)

    def visit(carry: tuple, _: None) -> tuple:
        block, (d_rows, d_columns, d_bias) = carry
        coming = _pass_on(axes, block)
        of_block = _sweep_backward(law, not itself, rows, block[0], bias, of_rows, block[1])
        d_rows, d_columns, d_bias = sweep.merge((d_rows, d_columns, d_bias), of_block)
        return (coming, (d_rows, _pass_on(axes, d_columns), d_bias)), None

    start = sweep.nothing(like, rows.factor, columns.factor)
    (_, gradients), _ = jax.lax.scan(visit, ((columns, of_columns), start), length=jax.lax.axis_size(axes))
    d_rows, d_columns, d_bias = gradients
    return d_rows, d_columns, jax.lax.psum(d_bias, axes)
