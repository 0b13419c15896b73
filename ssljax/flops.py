"""FLOPs of matrix products and convolutions, counted in the program as it was written.

XLA's own count takes the body of a loop once, however often it runs, and looks at one device. Here the jaxpr is walked:
scanned bodies count as often as they run, what is rematerialised counts again, and all devices are counted together.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def matmul_flops(
    function: Callable[..., Any], *arguments: Any, passes: Callable[[Any], float] = lambda equation: 1.0
) -> float:
    """FLOPs (two per multiply-add) of every `dot_general` and `conv_general_dilated` in `function(*arguments)`.

    Global figures: inside a `shard_map`, times the devices of its manual axes. Of the branches of a `cond` the most
    costly one, of code that depends on the platform the default. A `while` loop counts as often as a comparison with a
    constant says (`fori_loop`), or else once: then the result is a lower bound. What multiplies nothing (normalisation,
    softmax, augmentation) is left out.

    Args:
      arguments: arrays or `jax.ShapeDtypeStruct`s.
      passes: the weight of a product, from its equation: how often the hardware makes it (see `Chip.passes`).
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, passes)


def _count(jaxpr: Jaxpr, passes: Callable[[Any], float]) -> float:
    return sum(_flops_of(equation, passes) for equation in jaxpr.eqns)


def _flops_of(equation: Any, passes: Callable[[Any], float]) -> float:
    params = equation.params
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            return 2.0 * equation.outvars[0].aval.size * math.prod(lhs[i] for i in contracted) * passes(equation)
        case "conv_general_dilated":
            return 2.0 * _multiply_adds(equation) * passes(equation)
        case "scan":
            return params["length"] * _count(params["jaxpr"].jaxpr, passes)
        case "while":
            return _trip_count(equation) * _count(params["body_jaxpr"].jaxpr, passes)
        case "cond":
            platforms = params.get("branches_platforms") or (None,) * len(params["branches"])
            branches = [b for b, names in zip(params["branches"], platforms, strict=True) if names is None]
            return max(_count(branch.jaxpr, passes) for branch in branches)
        case "shard_map":
            devices = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            return devices * _count(params["jaxpr"], passes)
        case _:  # jit, remat, custom derivatives, ...: once
            return sum(_count(getattr(p, "jaxpr", p), passes) for p in params.values() if _is_jaxpr(p))


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


def _multiply_adds(equation: Any) -> float:
    """Of a convolution: pairs (output position, kernel position) that meet a pixel, times batch and channels.

    Padding and the zeros between dilated pixels (the backward pass of a strided convolution) do not count.
    """
    params, (lhs, kernel) = equation.params, (v.aval.shape for v in equation.invars[:2])
    numbers, out = params["dimension_numbers"], equation.outvars[0].aval.shape
    meetings = 1
    for axis, (stride, (low, _), spread, dilation) in enumerate(
        zip(params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True)
    ):
        size, positions = lhs[numbers.lhs_spec[2 + axis]], out[numbers.out_spec[2 + axis]]
        taps = range(kernel[numbers.rhs_spec[2 + axis]])
        last = (size - 1) * spread
        at = (o * stride - low + k * dilation for o in range(positions) for k in taps)
        meetings *= sum(0 <= i <= last and i % spread == 0 for i in at)
    rows = lhs[numbers.lhs_spec[0]] // params["batch_group_count"]
    return float(meetings) * rows * kernel[numbers.rhs_spec[0]] * kernel[numbers.rhs_spec[1]]


def _trip_count(equation: Any) -> int:
    """How often a loop `while i < n` with constants i and n runs, counting by one; 1 where that is not its form."""
    params = equation.params
    condition, start = params["cond_jaxpr"].jaxpr, params["cond_nconsts"]
    if len(condition.eqns) != 1 or condition.eqns[0].primitive.name != "lt":
        return 1
    counter, limit = condition.eqns[0].invars
    if isinstance(counter, Literal) or not isinstance(limit, Literal) or counter not in condition.invars[start:]:
        return 1
    first = equation.invars[params["body_nconsts"] + condition.invars.index(counter)]
    return int(limit.val - first.val) if isinstance(first, Literal) else 1
