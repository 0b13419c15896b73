"""The contract every method keeps, and the few helpers that make keeping it short.

A method is a frozen dataclass of hyper-parameters and Linen modules with four pure functions. It is written as if
there were one device and one batch; the trainer places it. Whatever must survive a step and is not a parameter (EMA
teacher, queue, batch statistics) is *method state*: a nested dict, sharded, checkpointed and resumed like the
parameters.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssljax.shards import each_shard, logical_shards

Array = jax.Array
Params = dict[str, Any]
State = dict[str, Any]
Batch = dict[str, Array]
Metrics = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a step knows about the run. Schedules (momentum, temperature, ...) are functions of `progress`."""

    key: Array  # a fresh random key for this step
    step: Array  # int32 scalar, steps taken so far
    progress: Array  # float32 scalar, 0 at the first step, 1 after the last
    micro_batches: int = field(default=1, metadata={"static": True})  # into how many parts `forward` cuts its rows


@runtime_checkable
class Method(Protocol):
    """A pretraining method.

    `metrics` is a dict of float scalars. It may also carry `"embeddings"`: a tuple of one or two arrays `[B, D]` whose
    rows are (positive pairs of) embeddings; the trainer derives collapse diagnostics from some of the rows at log steps
    only. A scalar named `"loss/..."` is a term of the loss: when the loss turns NaN the message names the first term
    that is not finite.

    A method whose class says `supports_micro_batches = True` hands `ctx.micro_batches` to `forward` for its large
    networks and makes one loss of all their outputs.
    """

    def init(self, key: Array, batch: Batch) -> tuple[Params, State]:
        """Parameters and method state; `batch` gives shapes only (it holds zeros)."""
        ...

    def loss(self, params: Params, state: State, batch: Batch, ctx: Context) -> tuple[Array, tuple[State, Metrics]]:
        """The scalar loss of the global batch, the next method state and the metrics."""
        ...

    def update(self, params: Params, state: State, ctx: Context) -> tuple[Params, State]:
        """Called after the optimiser's step with the new parameters: EMA teachers, clamps and other projections."""
        ...

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, Array]:
        """Frozen representations of what `batch` holds: `"image"` [B, D], `"patches"` [B, H, W, D], `"text"` [B, D]."""
        ...


def init_net(module: nn.Module, key: Array, *inputs: Any, **kwargs: Any) -> dict[str, Any]:
    """`{"params": ..., "stats": ...}` of a Linen module: parameters, and batch statistics (`{}` when it has none)."""
    variables = module.init({"params": key, "dropout": key}, *inputs, **kwargs)
    return {"params": variables["params"], "stats": variables.get("batch_stats", {})}


def forward(
    module: nn.Module,
    params: Params,
    stats: State,
    *inputs: Any,
    train: bool = True,
    key: Array | None = None,
    micro_batches: int | None = None,
    **kwargs: Any,
) -> tuple[Any, State]:
    """Applies a module. Returns its output and the next batch statistics (unchanged with `train=False`).

    `key` is needed only by modules with drop-path or dropout, in training.

    `micro_batches` is given (`ctx.micro_batches`) for large networks. With k > 1 the rows of `inputs` pass in k equal
    parts, one after the other, and the backward pass computes each part anew: the memory of one part, for one more
    forward pass. The output is that of all rows, so the loss and its gradient are those of the full batch, up to
    rounding. Part c is rows c, c + k, c + 2k, ... (these lie on all devices alike). Batch normalisation sees one part
    at a time; its running averages take the mean.

    In a deterministic run (`ssljax.shards`) these networks take one logical shard after the other, each in k parts, and
    all of that holds for the parts of a logical shard, also with k = 1. Whatever `micro_batches` is not given for,
    every device computes for the whole batch.
    """

    def apply(params: Params, key: Array | None, *inputs: Any) -> tuple[Any, State]:
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return module.apply(variables, *inputs, train=False, **kwargs), {}
        rngs = {} if key is None else {"dropout": key}
        output, changed = module.apply(variables, *inputs, train=True, rngs=rngs, mutable=["batch_stats"], **kwargs)
        return output, dict(changed).get("batch_stats", stats)

    parts = micro_batches if micro_batches and train else 1
    if logical_shards() and micro_batches is not None:
        keys = None if key is None else jax.random.split(key, logical_shards())

        def of_shard(params: Params, key: Array | None, *inputs: Any) -> tuple[Any, State]:
            output, changed = _in_parts(apply, parts, params, None if key is None else key[0], *inputs)
            return output, jax.tree.map(lambda x: x[None], changed)

        output, changed = each_shard(of_shard, params, keys, *inputs)
        changed = jax.tree.map(lambda x: x.mean(axis=0), changed)
    else:
        encode = apply if parts == 1 else partial(_in_parts, apply, parts)
        output, changed = encode(params, key, *inputs)
    return output, changed if train else stats


def _in_parts(apply: Any, count: int, params: Params, key: Array | None, *inputs: Any) -> tuple[Any, State]:
    """`apply` on `count` parts of the rows, one after the other."""

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

    keys = None if key is None else jax.random.split(key, count)
    of_part = jax.checkpoint(apply, prevent_cse=False)  # the loop keeps the parts apart already
    outputs, stats = jax.lax.map(lambda part: of_part(params, *part), (keys, *jax.tree.map(split, inputs)))
    return jax.tree.map(join, outputs), jax.tree.map(lambda x: x.mean(axis=0), stats)


def ema(target: Any, source: Any, momentum: Array | float) -> Any:
    """`momentum * target + (1 - momentum) * source`, leaf by leaf."""
    return jax.tree.map(lambda t, s: momentum * t + (1 - momentum) * s, target, source)


def pair_rows(a: Array, b: Array) -> Array:
    """Interleaves two views `[B, ...]` to `[2B, ...]` as rows a0, b0, a1, b1, ...

    Concatenating them instead would put the halves on other devices than the batch they came from: with interleaving
    a batch-sharded array needs no traffic. `split_pairs` undoes it.
    """
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def split_pairs(rows: Array) -> tuple[Array, Array]:
    """The two views `[B, ...]` of rows `[2B, ...]` made by `pair_rows`."""
    pairs = rows.reshape(-1, 2, *rows.shape[1:])
    return pairs[:, 0], pairs[:, 1]
