"""Logical shards: gradients whose bits do not depend on how many devices compute them.

A sum of floating-point numbers depends on its order, and as a rule the mesh decides it. With `deterministic=L` a batch
is L *logical shards*, blocks of B / L rows, whatever the mesh; a device has a run of them. Then

1. A network sees one logical shard at a time, in a loop: the same program of the same shapes on every mesh.
2. Gradients of parameters are added up over the logical shards as a binary tree, (0 + 1) + (2 + 3) and so on: within a
   device by loops of two turns within one another, over the devices by the rest of the same tree.
3. Every device computes all else (heads, the loss) for the whole batch.

All of it is in one `shard_map`: the compiler has no choice how to split it. This rests on equal devices computing equal
programs equally; it was verified bit for bit on CPU devices of one machine. (The threads of XLA:CPU belong to the
device: where it multiplies matrices, their number decides how a sum is cut. A process has max(cores, virtual devices)
of them, or `NPROC` instead of the cores.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

AXIS = "replica"  # of the mesh; the only one that may split a batch here
WHOLE = PartitionSpec()

# While a deterministic gradient is traced: how many logical shards its batch has.
_count = jax.make_user_context(0)


def logical_shards() -> int:
    """Into how many logical shards a batch is cut; 0 where sums over its rows may take any order."""
    return _count.value


def in_shards(gradient: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`gradient(state, batch)`, a loss with its gradients and more, from `count` logical shards of the batch.

    `gradient` sees a device's rows of the batch, which only `views_of` and `each_shard` may read.

    Raises:
        ValueError: something else has read them.
    """

    def of_device(state: Any, batch: Any) -> Any:
        results = gradient(state, batch)
        if any(map(_differs, jax.tree.leaves(results))):
            raise ValueError(
                "deterministic: the loss depends on pictures in a way that only one device knows of. It may read them "
                "only through `ssljax.method.forward(..., micro_batches=ctx.micro_batches)`: let the network's output "
                "carry what it needs of them"
            )
        return results

    def of_batch(state: Any, batch: Any) -> Any:
        with _count(count):
            return jax.shard_map(of_device, in_specs=(WHOLE, PartitionSpec(AXIS)), out_specs=WHOLE)(state, batch)

    return of_batch


def each_shard(function: Callable[..., Any], params: Any, *rows: Any, gather: bool = True) -> Any:
    """`function(params, *rows)` of every logical shard, its results put together row by row.

    Args:
        function: sees the rows of one logical shard. It may close over other arrays, to which no gradient goes.
        rows: trees of arrays, the device's rows of the batch or (equal on all devices) all rows.
        gather: whether every device needs all results, or only those of its own rows.
    """
    turns = logical_shards() // lax.axis_size(AXIS)
    lent = _lend(params)
    shards = jax.tree.map(lambda x: x.reshape(turns, -1, *x.shape[1:]), jax.tree.map(_own, rows))
    results = _in_pairs(lambda shard: function(lent, *shard), turns, shards)
    results = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
    # Behind the barrier, lest the programs of one device and of many be fused in different ways.
    return lax.optimization_barrier(_all_rows(results) if gather else results)


def views_of(views: Callable[..., Any], key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`views(key, batch)`; of each logical shard where there are any.

    There `views` gets the keys of its rows, which are those that `Views` gives them. Pictures and the like stay on the
    device of their rows; of all that is smaller (labels, captions, ...) every device gets the whole, for losses.
    """
    if not logical_shards():
        return views(key, batch)
    keys = jax.random.split(key, len(next(iter(batch.values()))) * lax.axis_size(AXIS))
    seen = each_shard(lambda _, keys, batch: views(keys, batch), {}, keys, batch, gather=False)
    return {name: x if x.ndim > 2 else _all_rows(x) for name, x in seen.items()}


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


def compiler_options(platform: str) -> dict[str, Any]:
    """With these, programs for different numbers of devices differ in nothing but what they send."""
    # XLA merges equal operations earlier in programs for several devices than in those for one, and rewrites others by
    # the number of their users: never merged, they stay alike.
    options: dict[str, Any] = {"xla_disable_hlo_passes": "cse"}
    return options | {"xla_gpu_deterministic_ops": True} if platform == "gpu" else options


def _in_pairs(function: Callable[[Any], Any], turns: int, rows: Any) -> Any:
    """`lax.map` over the first axis, of length `turns`; gradients of what `function` closes over are a tree's sums.

    A loop adds them up one by one, so each has two turns, and all but the innermost hold another. (XLA would take a
    loop of one turn apart, and fuse, hence round, in another way.)
    """
    if turns == 2:
        return lax.map(function, rows)
    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), rows)
    results = lax.map(partial(_in_pairs, function, turns // 2), halves)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _all_rows(tree: Any) -> Any:
    return jax.tree.map(lambda x: lax.all_gather(x, AXIS, tiled=True, to="invarying"), tree)


@jax.custom_vjp
def _lend(params: Any) -> Any:
    """Parameters as each device's own. Its gradient is added up over the devices as a tree."""
    return lax.pcast(params, AXIS, to="varying")


def _add_up(_: None, gradient: Any) -> tuple[Any]:
    vector, as_tree = ravel_pytree(gradient)  # one exchange for all
    return (lax.optimization_barrier(as_tree(_sum_over_devices(vector))),)


_lend.defvjp(lambda params: (_lend(params), None), _add_up)


def _sum_over_devices(vector: jax.Array) -> jax.Array:
    """The sum over devices as a tree: each adds up its slice of everyone's vector. The traffic of a ring all-reduce."""
    n = lax.axis_size(AXIS)
    slices = jnp.pad(vector, (0, -len(vector) % n)).reshape(n, -1)
    mine = lax.all_to_all(slices, AXIS, 0, 0)
    while len(mine) > 1:
        mine = mine[0::2] + mine[1::2]
    return lax.all_gather(mine[0], AXIS, tiled=True, to="invarying")[: len(vector)]


def _differs(x: jax.Array) -> bool:
    """Whether each device has another array, by jax's own account."""
    kind: Any = jax.typeof(x)
    return AXIS in kind.manual_axis_type.varying


def _own(x: jax.Array) -> jax.Array:
    """A device's rows of what has all rows, else what was given."""
    if _differs(x):
        return x
    return _own_rows(x) if jnp.issubdtype(x.dtype, jnp.inexact) else _slice(x)


def _slice(x: jax.Array) -> jax.Array:
    size = len(x) // lax.axis_size(AXIS)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * size, size)


# jax would add up gradients of the slices over the devices, zeros but for one: the sign of a zero depended on them.
_own_rows = jax.custom_vjp(_slice)
_own_rows.defvjp(lambda x: (_slice(x), None), lambda _, gradient: (_all_rows(gradient),))
