"""Where a NaN comes from: the step once more, watching every operation for the first value that is not finite."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from ssljax.rules import leaf_name

_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters under which calls keep what they call
_TURN = "\0"  # stands in a place for the turn of a loop, which is known only after the run
# Operations that pass wrong values on and never make one. All others are watched.
# fmt: off
_PASSING = {
    "abs", "broadcast_in_dim", "ceil", "clamp", "concatenate", "convert_element_type", "copy", "cumax", "cumin",
    "dynamic_slice", "dynamic_update_slice", "erf", "expand_dims", "floor", "gather", "iota", "logistic", "max",
    "min", "neg", "optimization_barrier", "pad", "reduce_max", "reduce_min", "reshape", "rev", "round", "select_n",
    "sharding_constraint", "sign", "slice", "sort", "squeeze", "stop_gradient", "tanh", "transpose",
}
# fmt: on


def first_not_finite(function: Callable[..., Any], *args: Any) -> str | None:
    """The operation of `function(*args)` whose output is the first NaN (or +inf, when there is no NaN), in words.

    Names the module path that Flax records (`ViT/block_3/attn`; `[3]` is the turn of a loop), the operation and the
    line of code, or the leaf of an argument that holds NaN already. -inf is left out: masks are made of it. None if all
    is finite. Compiles a program of its own.
    """
    for argument in args:
        for path, x in jax.tree_util.tree_leaves_with_path(argument):
            if jnp.issubdtype(x.dtype, jnp.inexact) and jnp.isnan(x).any():
                return f"there is NaN already in {leaf_name(path) or 'what is given'}, before any operation"
    closed = jax.make_jaxpr(function)(*args)
    for wrong, what in ((jnp.isnan, "NaN"), (jnp.isposinf, "infinity")):
        watch = _Watch(wrong)
        flags = jax.device_get(jax.jit(lambda *values, w=watch: w.run(closed, values))(*jax.tree.leaves(args)))
        for place, flag in zip(watch.places, flags, strict=True):
            if flag.any():
                for turn in np.argwhere(flag)[0]:
                    place = place.replace(_TURN, str(turn), 1)
                return f"the first {what} comes out of {place}"
    return None


class _Watch:
    """Runs a jaxpr and notes, for each operation, whether its output is wrong although its inputs are not.

    Every value goes with its `taint`: whether anything in it is wrong (bool scalar); False for constants, whose NaN is
    the fault of the operation that lets it through.
    """

    def __init__(self, wrong: Callable[[Any], jax.Array]):
        self._wrong, self._outer = wrong, ""  # the line of code of the call that is being walked
        self.places: list[str] = []

    def run(self, closed: Any, values: Sequence[Any]) -> list[jax.Array]:
        """A flag (bool, an axis for each loop around it) for each of `places`."""
        self.places.clear()
        return self._walk(*_parts(closed), values, [self._taint(x) for x in values], "")[2]

    def _walk(self, jaxpr: Any, consts: Any, args: Any, taints: Any, path: str) -> tuple[list, list, list[jax.Array]]:
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        taint: dict[Any, Any] = dict(
            zip((*jaxpr.constvars, *jaxpr.invars), (*[False] * len(consts), *taints), strict=True)
        )
        value_of = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]  # noqa: E731
        taint_of = lambda atom: False if isinstance(atom, core.Literal) else taint[atom]  # noqa: E731
        flags: list[jax.Array] = []
        for eqn in jaxpr.eqns:
            inputs, tainted = [value_of(x) for x in eqn.invars], [taint_of(x) for x in eqn.invars]
            where = "/".join(part for part in (path, str(eqn.source_info.name_stack)) if part)
            outputs, wrong, inside = self._operation(eqn, inputs, tainted, where)
            values.update(zip(eqn.outvars, outputs, strict=True))
            taint.update(zip(eqn.outvars, wrong, strict=True))
            flags += inside
        return [value_of(x) for x in jaxpr.outvars], [taint_of(x) for x in jaxpr.outvars], flags

    def _operation(self, eqn: Any, inputs: list, tainted: list, where: str) -> tuple[list, list, list[jax.Array]]:
        """Outputs of one operation, their taints, and the flags of `places` that it adds."""
        name = eqn.primitive.name
        if name == "scan":
            return self._scan(eqn, inputs, where)
        inner = next((eqn.params[key] for key in _INNER if key in eqn.params), None)
        if inner is not None and name not in ("shard_map", "pallas_call"):
            outer, self._outer = self._outer, _line(eqn) or self._outer
            found = self._walk(*_parts(inner), inputs, tainted, where)
            self._outer = outer
            return found
        outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
        outputs = list(outputs) if eqn.primitive.multiple_results else [outputs]
        before = _any(tainted)
        if name in _PASSING and not any(_is_wrong_constant(x) for x in inputs):
            return outputs, [before] * len(outputs), []
        after = [self._taint(x) for x in outputs]
        if all(taint is False for taint in after):
            return outputs, after, []
        self.places.append(f"`{name}` in {where or 'the step'}{_line(eqn) or self._outer}")
        return outputs, after, [jnp.logical_and(_any(after), jnp.logical_not(before))]

    def _scan(self, eqn: Any, inputs: list, where: str) -> tuple[list, list, list[jax.Array]]:
        body, fixed = _parts(eqn.params["jaxpr"])
        rank = lambda v: len(v.aval.shape)  # noqa: E731
        # Inputs are constants, carry, rows; outputs are carry, rows. Rows have one dimension less inside the body.
        carried = sum(rank(out) == rank(v) for out, v in zip(eqn.outvars, body.outvars, strict=True))
        first = len(inputs) - sum(rank(v) > rank(x) for v, x in zip(eqn.invars, body.invars, strict=True))
        consts, carry, rows = inputs[: first - carried], inputs[first - carried : first], inputs[first:]
        known = len(self.places)

        def turn(carry: Any, row: Any) -> Any:
            del self.places[known:]  # jax may trace the body more than once
            values = [*consts, *carry, *row]
            outputs, _, flags = self._walk(body, fixed, values, [self._taint(x) for x in values], f"{where}[{_TURN}]")
            return outputs[:carried], (outputs[carried:], flags)

        carry, (stacked, flags) = jax.lax.scan(
            turn, carry, rows, length=eqn.params["length"], reverse=eqn.params["reverse"]
        )
        outputs = [*carry, *stacked]
        return outputs, [self._taint(x) for x in outputs], flags

    def _taint(self, x: Any) -> Any:
        return self._wrong(x).any() if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else False


def _is_wrong_constant(x: Any) -> bool:
    return not isinstance(x, Tracer) and np.asarray(x).dtype.kind == "f" and not np.isfinite(x).all()


def _any(taints: Sequence[Any]) -> Any:
    traced = [taint for taint in taints if taint is not False]
    return jnp.stack(traced).any() if traced else False


def _parts(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr, closed or not, and its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _line(eqn: Any) -> str:
    """The innermost line of the traceback that is not jax's own: `, file.py:12`."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        parts = frame.file_name.replace("\\", "/").split("/")
        if not {"jax", "flax", "optax"} & set(parts) and "site-packages" not in parts:
            return f", {'/'.join(parts[-3:])}:{frame.line_num}"
    return ""
