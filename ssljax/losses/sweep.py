"""One pass over a table of similarities, tile by tile: the arithmetic of every contrastive loss, on one device.

The table L_ij = factor_i factor_j (x_i . x_j) + bias of all rows against all columns is never made. `forward` walks its
tiles and keeps a few numbers per row and column (a log-sum-exp, a sum over positives); `backward` walks them again,
computes each tile anew and turns dL into gradients of both towers: 2 + 6 products of b x B x D in all, memory linear in
the batch. What is summed, and what dL is, a *law* says (`ssljax.losses.laws`).

Precision: operands are float32 (multiplied in true float32 on every platform) or bfloat16; products, log-sum-exps and
gradients accumulate in float32. In the backward pass dL is rounded to the operands' type before its two products.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # stands for -inf, and survives a subtraction from itself


class Tower(NamedTuple):
    """One side of the table, row by row."""

    x: Float[Array, "n d"]
    factor: Float[Array, " n"]  # what multiplies a row's logits: scale / |x| on one side, 1 / |x| on the other
    ids: Int[Array, " n"] | None = None  # equal ids belong together (class, image, caption)
    position: Int[Array, " n"] | None = None  # in the batch: tells a row from itself
    valid: Bool[Array, " n"] | None = None  # rows that exist; the others neither ask nor answer
    teacher: "Tower | None" = None  # the same rows as another network sees them


class LogSum(NamedTuple):
    """A running log-sum-exp: exp(peak) * total, and exp(peak) * weighted for averages under the same softmax."""

    peak: Float[Array, " n"]
    total: Float[Array, " n"]
    weighted: Float[Array, " n"] | None = None

    def log(self) -> Float[Array, " n"]:
        """log of the sum; -inf where nothing was summed."""
        return jnp.where(self.peak > MASKED / 2, self.peak + jnp.log(self.total), -jnp.inf)

    def at(self, peak: Array) -> "LogSum":
        """The same sums relative to another peak."""
        factor = jnp.exp(self.peak - peak)
        return LogSum(peak, self.total * factor, None if self.weighted is None else self.weighted * factor)

    def merge(self, other: "LogSum") -> "LogSum":
        peak = jnp.maximum(self.peak, other.peak)
        return LogSum(peak, *jax.tree.map(jnp.add, self.at(peak)[1:], other.at(peak)[1:]))


class Nearest(NamedTuple):
    """The column of the largest logit so far."""

    peak: Float[Array, " n"]
    position: Int[Array, " n"]

    def merge(self, other: "Nearest") -> "Nearest":
        return Nearest(*(jnp.where(other.peak > self.peak, b, a) for a, b in zip(self, other, strict=True)))


class Law(Protocol):
    """What a loss sums over a tile of logits, and what its gradient there is. Statistics are trees of [n] arrays."""

    def partials(self, logits: Array, rows: Tower, columns: Tower) -> tuple[Any, Any]:
        """Statistics of the tile's rows and of its columns (None without)."""
        ...

    def finish(self, partials: Any) -> Any:
        """The result per row (or per column) from the statistics of all tiles."""
        ...

    def gradient(self, logits: Array, rows: Tower, columns: Tower, of_rows: "Results", of_columns: "Results") -> Array:
        """dL of the tile, from the finished results and their cotangents."""
        ...


class Results(NamedTuple):
    """What `finish` gave for some rows (or columns) and the cotangent of that; both None where a law has none."""

    value: Any
    cotangent: Any


def product(equation: str, a: Array, b: Array) -> Array:
    """An einsum of float32 or bfloat16 operands, exact products, summed in float32."""
    # TPUs and recent GPUs multiply float32 in bfloat16 or TF32 by default: 1e-3 off in a cosine, 0.1 at scale 100.
    precision = None if a.dtype == b.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def logits(rows: Tower, columns: Tower, bias: Array | None = None) -> Float[Array, "r c"]:
    """A tile of the table; factors are [r, 1] and [1, c]."""
    table = product("id,jd->ij", rows.x, columns.x) * (rows.factor * columns.factor)
    return table if bias is None else table + bias


def forward(law: Law, rows: Tower, columns: Tower, bias: Array | None, tile: int) -> tuple[Any, Any]:
    """Statistics of all rows and of all columns, to be merged with those of other blocks or finished."""
    n, m = len(rows.x), len(columns.x)
    row_tiles, column_tiles = _tiles(rows, columns, tile)
    like = jax.eval_shape(law.partials, *_one_tile(row_tiles, column_tiles, bias))
    some = row_tiles.factor, column_tiles.factor

    def of_columns(row_stats: Any, columns: Tower) -> tuple[Any, Any]:
        def of_rows(i: Array, stats: tuple[Any, Any]) -> tuple[Any, Any]:
            rows = _at(row_tiles, i)
            of_tile, column_stats = law.partials(logits(rows, columns, bias), rows, columns)
            row_stats = _put(stats[0], i, merge(_at(stats[0], i), of_tile))
            return row_stats, merge(stats[1], column_stats)

        return jax.lax.fori_loop(0, len(row_tiles.x), of_rows, (row_stats, nothing(like[1], *some)))

    start = nothing(like[0], *some, stack=len(row_tiles.x))
    row_stats, column_stats = jax.lax.scan(of_columns, start, column_tiles)
    return _numbers(row_stats, n), _numbers(column_stats, m)


def backward(
    law: Law,
    rows: Tower,
    columns: Tower,
    bias: Array | None,
    of_rows: Results,
    of_columns: Results,
    tile: int,
    column_gradient: bool = True,
) -> tuple[Float[Array, "n d"], Float[Array, "m d"] | None, Float[Array, ""] | None]:
    """Gradients of both towers' `x` at fixed factors, and of the bias; in float32."""
    n, m = len(rows.x), len(columns.x)
    row_tiles, column_tiles = _tiles(rows, columns, tile)
    row_results = _tile(of_rows, len(row_tiles.x), upright=True)
    column_results = _tile(of_columns, len(column_tiles.x), upright=False)
    some = row_tiles.factor, column_tiles.factor

    def over_columns(sums: tuple[Array, Any], tile: tuple[Tower, Results]) -> tuple[Any, Any]:
        columns, of_columns = tile

        def over_rows(i: Array, sums: tuple[Array, Any, Any]) -> tuple[Array, Any, Any]:
            of_rows, of_bias, of_tile = sums
            rows = _at(row_tiles, i)
            d = law.gradient(logits(rows, columns, bias), rows, columns, _at(row_results, i), of_columns)
            if of_bias is not None:
                of_bias += d.sum()
            d = (d * (rows.factor * columns.factor)).astype(columns.x.dtype)
            of_rows = _put(of_rows, i, _at(of_rows, i) + product("ij,jd->id", d, columns.x))
            if of_tile is not None:  # transposed: XLA:CPU is a fifth faster so
                of_tile += product("id,ij->dj", rows.x, d)
            return of_rows, of_bias, of_tile

        transposed = zeros(columns.x.shape[::-1], *some) if column_gradient else None
        of_rows, of_bias, of_tile = jax.lax.fori_loop(0, len(row_tiles.x), over_rows, (*sums, transposed))
        return (of_rows, of_bias), None if of_tile is None else of_tile.T

    start = zeros(row_tiles.x.shape, *some), None if bias is None else zeros((), *some)
    (d_rows, d_bias), d_columns = jax.lax.scan(over_columns, start, (column_tiles, column_results))
    return _vectors(d_rows, n), None if d_columns is None else _vectors(d_columns, m), d_bias


def merge(a: Any, b: Any) -> Any:
    """Statistics of two sets of tiles together; plain arrays are sums."""
    return jax.tree.map(lambda a, b: a.merge(b) if _is_running(a) else a + b, a, b, is_leaf=_is_running)


def merge_over(axes: tuple[str, ...], stats: Any) -> Any:
    """Statistics of all devices together: `merge` over mesh axes, of sums and log-sum-exps."""

    def together(x: Any) -> Any:
        if not isinstance(x, LogSum):
            return jax.lax.psum(x, axes)
        peak = jax.lax.pmax(x.peak, axes)
        return LogSum(peak, *jax.lax.psum(x.at(peak)[1:], axes))

    return jax.tree.map(together, stats, is_leaf=_is_running)


def nothing(like: Any, *varying: Array, stack: int | None = None) -> Any:
    """The statistics of no tile at all, of the shapes in `like` (behind a leading axis of size `stack`)."""

    def none(x: Any) -> Any:
        if _is_running(x):
            return jax.tree.map(none, x)._replace(peak=none(x.peak) + MASKED)
        return zeros(x.shape if stack is None else (stack, *x.shape), *varying, dtype=x.dtype)

    return jax.tree.map(none, like, is_leaf=_is_running)


def zeros(shape: tuple[int, ...], *varying: Array, dtype: Any = jnp.float32) -> Array:
    """Zeros that vary over the manual mesh axes over which any of `varying` does: a loop's carry must."""
    return sum((jnp.zeros_like(x, dtype, shape) for x in varying), start=jnp.zeros(shape, dtype))


def _is_running(x: Any) -> bool:
    return isinstance(x, LogSum | Nearest)


# Tiles: x [n, d] as [tiles, size, d]; numbers per row [n] as [tiles, size, 1], per column as [tiles, 1, size].


def _tiles(rows: Tower, columns: Tower, tile: int) -> tuple[Tower, Tower]:
    """Both towers in tiles of about `tile` x `tile` logits; the last ones padded with rows that are not valid."""
    n, m = len(rows.x), len(columns.x)
    height = _tile_size(n, tile)
    width = _tile_size(m, tile * tile // height)
    if n % height or m % width:
        rows, columns = (
            t if t.valid is not None else t._replace(valid=jnp.ones(len(t.x), bool)) for t in (rows, columns)
        )
    return _tile(rows, -(-n // height), upright=True), _tile(columns, -(-m // width), upright=False)


def _tile_size(n: int, most: int) -> int:
    """The largest size up to `most` that divides n, if one is over half of it; else `most`: the last tile is padded."""
    if n <= most:
        return n
    return next((size for size in range(most, most // 2, -1) if n % size == 0), most)


def _tile(tree: Any, count: int, *, upright: bool) -> Any:
    def split(x: Array) -> Array:
        size = -(-len(x) // count)
        if short := count * size - len(x):
            x = jnp.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, *((size, -1) if x.ndim > 1 or upright else (1, size)))

    return jax.tree.map(split, tree)


def _numbers(tiles: Any, n: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1)[:n], tiles)


def _vectors(tiles: Array, n: int) -> Float[Array, "n d"]:
    return tiles.reshape(-1, tiles.shape[-1])[:n]


def _at(tree: Any, i: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree: Any, i: Array, value: Any) -> Any:
    return jax.tree.map(lambda x, v: jax.lax.dynamic_update_index_in_dim(x, v, i, 0), tree, value)


def _one_tile(rows: Tower, columns: Tower, bias: Array | None) -> tuple[Any, Tower, Tower]:
    rows, columns = _at(rows, jnp.int32(0)), _at(columns, jnp.int32(0))
    return jax.eval_shape(logits, rows, columns, bias), rows, columns
