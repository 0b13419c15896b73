"""The sweep as Pallas kernels for TPUs: tiles of logits that never leave the chip's fast memory.

The same `forward` and `backward` as in `ssljax.losses.sweep`, with the same laws inside the kernels. A tile lives in
VMEM from its product to its sums, whatever XLA would do with it. The price: the two gradients of the backward pass are
two kernels that each compute the tile, because a kernel can add up either over rows or over columns: 2 + 8 products of
b x B x D instead of 2 + 6. Used where `sharded.TPU_KERNELS` is set; sizes must be multiples of 128.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ssljax.losses.sweep import Law, Results, Tower, logits, merge, nothing, product

LANES = 128


def fits(rows: Tower, columns: Tower) -> bool:
    """Whether the towers have the sizes that the kernels are written for."""
    towers = [t for t in (rows, columns, rows.teacher, columns.teacher) if t is not None]
    return all(size % LANES == 0 for t in towers for size in t.x.shape)


def forward(
    law: Law, rows: Tower, columns: Tower, bias: Array | None, tile: int, interpret: bool = False
) -> tuple[Any, Any]:
    """As `sweep.forward`."""
    height, width = _size(len(rows.x), tile), _size(len(columns.x), tile)
    inputs, specs = _operands(rows, columns, bias, height, width, lambda i, j: (i, j))
    tile_of = jax.eval_shape(
        lambda r, c: law.partials(logits(r, c, bias), r, c), *_one_tile(rows, columns, height, width)
    )
    row_like, column_like = (jax.tree.leaves(like) for like in tile_of)
    shapes = [jax.ShapeDtypeStruct((len(rows.x), 1), x.dtype) for x in row_like]
    shapes += [jax.ShapeDtypeStruct((1, len(columns.x)), x.dtype) for x in column_like]
    out_specs = [pl.BlockSpec((height, 1), lambda i, j: (i, 0)) for _ in row_like]
    out_specs += [pl.BlockSpec((1, len(columns.x)), lambda i, j: (0, 0)) for _ in column_like]  # stays in VMEM

    def kernel(*refs: Any) -> None:
        i, j = pl.program_id(0), pl.program_id(1)
        (rows, columns, bias), sums = _read(inputs, refs[: len(specs)]), refs[len(specs) :]
        new = law.partials(logits(rows, columns, bias), rows, columns)
        window = pl.ds(j * width, width)

        def add(first: Any, tree: Any, refs: Any, where: Any) -> None:
            @pl.when(first)
            def _() -> None:
                for ref, x in zip(refs, jax.tree.leaves(nothing(tree)), strict=True):
                    ref[where] = x

            so_far = jax.tree.unflatten(jax.tree.structure(tree), [ref[where] for ref in refs])
            for ref, x in zip(refs, jax.tree.leaves(merge(so_far, tree)), strict=True):
                ref[where] = x

        add(j == 0, new[0], sums[: len(row_like)], (slice(None), slice(None)))
        add(i == 0, new[1], sums[len(row_like) :], (slice(None), window))

    grid = (len(rows.x) // height, len(columns.x) // width)
    outputs = _call(kernel, grid, specs, shapes, out_specs, interpret)(*jax.tree.leaves(inputs))
    flat = [x.reshape(-1) for x in outputs]
    structures = [jax.tree.structure(x) for x in tile_of]
    return tuple(
        jax.tree.unflatten(structure, part)
        for structure, part in zip(structures, (flat[: len(row_like)], flat[len(row_like) :]), strict=True)
    )


def backward(
    law: Law,
    rows: Tower,
    columns: Tower,
    bias: Array | None,
    of_rows: Results,
    of_columns: Results,
    tile: int,
    column_gradient: bool = True,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """As `sweep.backward`."""
    half = tile // 2  # of both sides, for dL, its rounded form and the gradients beside the logits
    one = partial(_one_side, law, (rows, of_rows), (columns, of_columns), bias, half, interpret)
    d_rows, *d_bias = one(rows_side=True)
    d_columns = one(rows_side=False)[0] if column_gradient else None
    return d_rows, d_columns, d_bias[0].reshape(()) if d_bias else None


def _one_side(
    law: Law, rows: Any, columns: Any, bias: Array | None, tile: int, interpret: bool, rows_side: bool
) -> list[Array]:
    """The gradient of the rows (and of the bias), or that of the columns: the other side is the inner loop."""
    x = (rows if rows_side else columns)[0].x
    height, width = _size(len(rows[0].x), tile), _size(len(columns[0].x), tile)
    order = (lambda i, j: (i, j)) if rows_side else (lambda j, i: (i, j))
    inputs, specs = _operands(rows, columns, bias, height, width, order)
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32)]
    out_specs = [pl.BlockSpec((height if rows_side else width, x.shape[1]), lambda outer, inner: (outer, 0))]
    with_bias = rows_side and bias is not None
    if with_bias:
        shapes.append(jax.ShapeDtypeStruct((1, 1), jnp.float32))
        out_specs.append(pl.BlockSpec((1, 1), lambda outer, inner: (0, 0)))

    def kernel(*refs: Any) -> None:
        outer, inner = pl.program_id(0), pl.program_id(1)
        ((rows, of_rows), (columns, of_columns), bias), outputs = _read(inputs, refs[: len(specs)]), refs[len(specs) :]
        d = law.gradient(logits(rows, columns, bias), rows, columns, of_rows, of_columns)

        @pl.when(inner == 0)
        def _() -> None:
            outputs[0][...] = jnp.zeros_like(outputs[0])

        if with_bias:

            @pl.when((outer == 0) & (inner == 0))
            def _() -> None:
                outputs[1][...] = jnp.zeros_like(outputs[1])

            outputs[1][...] += jnp.sum(d, keepdims=True)
        d = (d * (rows.factor * columns.factor)).astype(columns.x.dtype)
        outputs[0][...] += product("ij,jd->id", d, columns.x) if rows_side else product("ij,id->jd", d, rows.x)

    grid = (len(rows[0].x) // height, len(columns[0].x) // width)
    return _call(kernel, grid if rows_side else grid[::-1], specs, shapes, out_specs, interpret)(
        *jax.tree.leaves(inputs)
    )


def _call(kernel: Any, grid: Any, specs: Any, shapes: Any, out_specs: Any, interpret: bool) -> Any:
    # Everything is added up over the inner axis, and column sums over the outer one: no axis may be split.
    parameters = pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=100 * 2**20)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=specs,
        out_shape=shapes,
        out_specs=out_specs,
        compiler_params=parameters,
        interpret=interpret,
    )


def _operands(rows: Any, columns: Any, bias: Array | None, height: int, width: int, order: Any) -> tuple[Any, list]:
    """Arrays as the kernels want them (numbers per row [n, 1], per column [1, m], no booleans), and their blocks."""

    def upright(x: Array) -> Array:
        return x if x.ndim == 2 else _number(x)[:, None]

    def lying(x: Array) -> Array:
        return x if x.ndim == 2 else _number(x)[None, :]

    inputs = (
        jax.tree.map(upright, rows),
        jax.tree.map(lying, columns),
        None if bias is None else bias.reshape(1, 1),
    )

    def of_rows(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((height, x.shape[1]), lambda *step: (order(*step)[0], 0))

    def of_columns(x: Array) -> pl.BlockSpec:
        if x.shape[0] == 1:
            return pl.BlockSpec((1, width), lambda *step: (0, order(*step)[1]))
        return pl.BlockSpec((width, x.shape[1]), lambda *step: (order(*step)[1], 0))

    specs = [
        *(of_rows(x) for x in jax.tree.leaves(inputs[0])),
        *(of_columns(x) for x in jax.tree.leaves(inputs[1])),
        *([] if bias is None else [pl.BlockSpec((1, 1), lambda *step: (0, 0))]),
    ]
    return inputs, specs


def _number(x: Array) -> Array:
    return x.astype(jnp.int32) if x.dtype == bool else x


def _read(inputs: Any, refs: Any) -> Any:
    """The blocks of this step, in the structure of `inputs`; masks are booleans again."""
    tree = jax.tree.unflatten(jax.tree.structure(inputs), [ref[...] for ref in refs])

    def masks(x: Any) -> Any:
        if not isinstance(x, Tower):
            return x
        return x._replace(valid=None if x.valid is None else x.valid != 0, teacher=masks(x.teacher))

    return jax.tree.map(masks, tree, is_leaf=lambda x: isinstance(x, Tower))


def _one_tile(rows: Tower, columns: Tower, height: int, width: int) -> tuple[Any, Any]:
    def cut(size: int, upright: bool) -> Any:
        def shape(x: Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                (size, x.shape[1]) if x.ndim == 2 else (size, 1) if upright else (1, size), x.dtype
            )

        return shape

    return jax.tree.map(cut(height, True), rows), jax.tree.map(cut(width, False), columns)


def _size(n: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides n."""
    return next(size for size in range(min(n, most) // LANES * LANES, 0, -LANES) if n % size == 0)
