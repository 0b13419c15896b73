"""Is the state what it should be? Asked now and then, and before every save: no NaN in it, and equal copies."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssljax.axes import AXES
from ssljax.digest import array_digest
from ssljax.rules import leaf_name
from ssljax.state import TrainState


class StateError(ArithmeticError):
    """The state is damaged: it holds NaN, or copies that should be equal differ. The message names what and where."""


class Soundness:
    """Checks of a train state that is placed by `shardings` on `mesh`; each reads the state once, on the devices."""

    def __init__(self, shapes: TrainState, shardings: TrainState, mesh: Mesh):
        self._names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
        self._specs = [tuple(s.spec) for s in jax.tree.leaves(shardings)]
        self._mesh = mesh
        specs = jax.tree.map(lambda s: s.spec, shardings)
        # Each device looks at its own copy: inside a shard_map nobody assumes that copies are equal.
        local = jax.shard_map(_digests, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(AXES), check_vma=False)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._digests = jax.jit(local, out_shardings=everywhere)
        self._nan = jax.jit(_has_nan, out_shardings=everywhere)

    @property
    def has_copies(self) -> bool:
        """Whether anything is held by more than one device."""
        return self._mesh.size > 1 and any(self._copies(spec) > 1 for spec in self._specs)

    def check_finite(self, state: TrainState) -> None:
        """Raises StateError if a leaf holds NaN (a parameter: or infinity)."""
        bad = [name for name, nan in zip(self._names, jax.device_get(self._nan(state)), strict=True) if nan]
        if bad:
            raise StateError(f"the state of step {int(state.step)} is not finite: {_some(bad)}. It is not saved")

    def check_copies(self, state: TrainState) -> None:
        """Raises StateError if a device's copy of a leaf differs from those of the others."""
        digests = np.asarray(jax.device_get(self._digests(state)))  # [devices, leaves, 2]
        if wrong := unequal_copies(digests, self._specs, self._mesh):
            raise StateError(f"step {int(state.step)}: {describe(wrong, self._names)}")

    def _copies(self, spec: Sequence[Any]) -> int:
        return self._mesh.size // max(1, len(np.unique(_parts(spec, self._mesh))))


def unequal_copies(digests: np.ndarray, specs: Sequence[Sequence[Any]], mesh: Mesh) -> dict[Any, list[int]]:
    """Device -> leaves of which its copy differs from most others'. `digests` [devices, leaves, n].

    Where no value has a majority (two copies only), all their devices are named: which one is right cannot be told.
    """
    devices = mesh.devices.reshape(-1)
    wrong: dict[Any, list[int]] = {}
    for leaf, spec in enumerate(specs):
        parts = _parts(spec, mesh)
        for part in np.unique(parts):
            holders = np.flatnonzero(parts == part)
            values = [digests[i, leaf].tobytes() for i in holders]
            (value, votes), *rest = Counter(values).most_common(2)
            for i, found in zip(holders, values, strict=True):
                if rest and (found != value or votes == rest[0][1]):
                    wrong.setdefault(devices[i], []).append(leaf)
    return wrong


def describe(wrong: dict[Any, list[int]], names: Sequence[str]) -> str:
    """The devices and processes whose copies differ, in words."""
    where = "; ".join(
        f"process {device.process_index}, device {device.id}: {_some([names[leaf] for leaf in leaves])}"
        for device, leaves in list(wrong.items())[:8]
    )
    sure = len({tuple(leaves) for leaves in wrong.values()}) > 1 or len(wrong) == 1
    return (
        f"copies of the state that must be equal are not ({where}). "
        + ("That machine computes or stores wrongly" if sure else "One of these machines computes or stores wrongly")
        + ": take it out of service. Nothing of this was saved; the same command continues from the newest checkpoint"
    )


def _parts(spec: Sequence[Any], mesh: Mesh) -> np.ndarray:
    """int [devices]: which part of a leaf with this spec each device of the mesh holds."""
    used = {axis for axes in spec if axes is not None for axis in ((axes,) if isinstance(axes, str) else axes)}
    shape = [mesh.shape[axis] if axis in used else 1 for axis in mesh.axis_names]
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    return np.broadcast_to(numbers, mesh.devices.shape).reshape(-1)


def _digests(state: TrainState) -> jax.Array:
    return jnp.stack([array_digest(x) for x in jax.tree.leaves(state)])[None]


def _has_nan(state: TrainState) -> jax.Array:
    def bad(path: Any, x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.zeros((), bool)
        return ~jnp.isfinite(x).all() if leaf_name(path).startswith("params/") else jnp.isnan(x).any()

    return jnp.stack([bad(path, x) for path, x in jax.tree_util.tree_leaves_with_path(state)])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
