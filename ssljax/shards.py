"""Logical shards: gradients whose bits do not depend on how many devices compute them.

A sum of floating-point numbers depends on its order, and as a rule the mesh decides it. With `deterministic=L` a batch
is L *logical shards*, blocks of B / L rows, whatever the mesh; a device has a run of them. Then

1. A network sees one logical shard at a time, in a loop: the same program of the same shapes on every mesh. Every
   device makes at least two trips, for XLA takes a loop of one trip apart and fuses, hence rounds, in another way.
2. Gradients of parameters are added up over the logical shards as a binary tree, (0 + 1) + (2 + 3) and so on: within a
   device by a binary counter, then over the devices by the rest of the same tree.
3. Every device computes all else (heads, the loss, the optimiser) for the whole batch. `compile_alike` sees to it
   that the compiler split none of it.

This rests on equal devices computing equal programs equally: it was verified bit for bit on CPU devices of one machine.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec
from jaxlib.mlir.passmanager import PassManager

from ssljax.axes import logical_shards

AXIS = "replica"  # of the mesh; the only one that may split a batch here
WHOLE = PartitionSpec()


def each_shard(function: Callable[..., Any], params: Any, *rows: Any, gather: bool = True) -> Any:
    """`function(params, *rows)` of every logical shard of the context, its results put together row by row.

    Args:
        function: sees B / L of the B rows. It may close over other arrays, to which no gradient goes.
        rows: trees of arrays `[B, ...]`, for any B that L divides.
        gather: whether every device needs all results, or only those of its own rows.
    """
    trips = logical_shards() // jax.sharding.get_abstract_mesh().shape[AXIS]

    def of_device(params: Any, rows: Any) -> Any:
        def of_shard(tally: Any, shard: tuple[jax.Array, Any]) -> tuple[Any, Any]:
            trip, rows = shard
            lent, tally = _lend(lax.stop_gradient(params), tally, trip)
            return tally, function(lent, *rows)

        shards = jax.tree.map(lambda x: x.reshape(trips, -1, *x.shape[1:]), rows)
        _, results = lax.scan(of_shard, _tally(params, trips), (jnp.arange(trips), shards))
        results = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
        return lax.all_gather(results, AXIS, tiled=True, to="invarying") if gather else results

    split = PartitionSpec(AXIS)
    mapped = jax.shard_map(of_device, in_specs=(WHOLE, split), out_specs=WHOLE if gather else split)
    return _fence(mapped(params, _whole_gradient(rows)))


def views_of(views: Callable[..., Any], key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`views(key, batch)`; of each logical shard where there are any.

    There `views` gets the keys of its rows, which are those that `Views` gives them. Pictures and the like stay with
    their rows; of all that is smaller (labels, captions, ...) every device gets the whole, so that losses may use it.
    """
    if not logical_shards():
        return views(key, batch)
    keys = jax.random.split(key, len(next(iter(batch.values()))))
    seen = each_shard(lambda _, keys, batch: views(keys, batch), {}, keys, batch, gather=False)
    return {name: x if x.ndim > 2 else _whole(x) for name, x in seen.items()}


def check_mesh(count: int, batch_size: int, micro_batches: int, mesh: jax.sharding.Mesh) -> None:
    """Raises if `count` logical shards of a batch do not go with this mesh, naming what does."""
    devices = mesh.shape[AXIS]
    if devices != mesh.size:
        raise ValueError(
            f"deterministic={count} needs whole parameters on every device, but the mesh is {dict(mesh.shape)}; set "
            "mesh.fsdp=1 and mesh.tensor=1"
        )
    if devices & (devices - 1):
        raise ValueError(f"deterministic={count} needs 1, 2, 4, 8, ... devices, not {devices}")
    if count < 2 * devices:
        raise ValueError(
            f"deterministic={count} is for at most {count // 2} device(s), two logical shards each; for {devices} set "
            f"deterministic={2 * devices} or more, and keep it: another number is another order of the sums"
        )
    if batch_size % (parts := count * micro_batches):
        low = batch_size // parts * parts
        sizes = f"{low} or {low + parts}" if low else f"{parts}"
        times = f" times {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise ValueError(f"batch size {batch_size} is not divisible by the {count} logical shards{times}; use {sizes}")


def compile_alike(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """The compiled program, as much like those for other numbers of devices as can be.

    Raises:
        ValueError: it adds up over devices in an order of the compiler's. Ours only move numbers between devices.
    """
    # XLA merges equal operations before it rewrites others by the number of their users, but only in programs for
    # several devices; for one device it merges later. Merged here, both start alike.
    module: Any = lowered.compiler_ir("stablehlo")
    with module.context:
        PassManager.parse("builtin.module(cse)").run(module.operation)
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    compiled = lowered.compile({"xla_gpu_deterministic_ops": True} if on_gpu else None)
    if found := re.search(r" (all-reduce|reduce-scatter)(-start)?\(.*", compiled.as_text() or ""):
        where = re.search(r'op_name="([^"]*)"', found[0])
        raise ValueError(
            "deterministic: the compiler split a sum over the devices, so its bits would depend on their number. A "
            "loss may read pictures only through `ssljax.method.forward(..., micro_batches=ctx.micro_batches)`: let "
            f"the network's output carry what it needs of them. The sum: {where[1] if where else found[0]}"
        )
    return compiled


def _whole(x: jax.Array) -> jax.Array:
    return lax.with_sharding_constraint(x, WHOLE)


def _fence(tree: Any) -> Any:
    """What is on the one side of it, and its gradient, is not fused with what is on the other."""
    return jax.tree.map(lambda x: lax.optimization_barrier(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree)


# Parameters pass through `_lend` once a trip, and what comes back for them is entered in the tally, a binary counter
# that the loop carries: place i of it holds the sum of 2^i shards.


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _tally(params: Any, trips: int) -> Any:
    def places(x: jax.Array) -> jax.Array:
        return jnp.zeros_like(lax.pcast(x, AXIS, to="varying"), shape=(trips.bit_length(), *x.shape))

    return jax.tree.map(places, params)


def _close(trips: int, _: None, tally: Any) -> tuple[Any]:
    vector, as_tree = ravel_pytree(jax.tree.map(lambda x: x[-1], tally))  # one exchange for all
    return (_fence(as_tree(_sum_over_devices(vector))),)


_tally.defvjp(lambda params, trips: (_tally(params, trips), None), _close)


@jax.custom_vjp
def _lend(params: Any, tally: Any, trip: jax.Array) -> tuple[Any, Any]:
    return lax.pcast(params, AXIS, to="varying"), tally


def _enter(trip: jax.Array, cotangents: tuple[Any, Any]) -> tuple[None, Any, None]:
    gradient, tally = cotangents
    places = len(jax.tree.leaves(tally)[0])
    entered = 2 ** (places - 1) - 1 - trip  # the loop runs backwards
    carries = lax.population_count(entered ^ (entered + 1)) - 1
    add = lambda i, sums: jax.tree.map(lambda t, s: t[i] + s, tally, sums)  # noqa: E731
    gradient = lax.fori_loop(0, carries, add, gradient)
    return None, jax.tree.map(lambda t, g: t.at[carries].set(g), tally, gradient), None


_lend.defvjp(lambda params, tally, trip: (_lend(params, tally, trip), trip), _enter)


def _sum_over_devices(vector: jax.Array) -> jax.Array:
    """The sum over devices as a tree: each adds up its slice of everyone's vector. The traffic of a ring all-reduce."""
    n = lax.axis_size(AXIS)
    slices = jnp.pad(vector, (0, -len(vector) % n)).reshape(n, -1)
    mine = lax.all_to_all(slices, AXIS, 0, 0)
    while len(mine) > 1:
        mine = mine[0::2] + mine[1::2]
    return lax.all_gather(mine[0], AXIS, tiled=True, to="invarying")[: len(vector)]


@jax.custom_vjp
def _whole_gradient(tree: Any) -> Any:
    """The same, but its gradient, which comes split over the devices, is put together for whoever computes with it."""
    return tree


_whole_gradient.defvjp(lambda tree: (tree, None), lambda _, gradient: (jax.tree.map(_whole, gradient),))
