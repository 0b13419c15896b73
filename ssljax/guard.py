"""Steps that would harm the run are not taken. The decision is made on the device, inside the step.

A step is refused when its loss, gradient norm or any metric is not finite, or when loss or gradient norm lie far above
those of the steps before. A refused step changes nothing: parameters, optimiser, method state and step counter stay as
they are bit for bit, as if its batch had never been in the stream.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclass(frozen=True)
class Guard:
    """When a step is refused, and what happens when refusals persist.

    After `in_a_row` refused steps the run goes back to its newest checkpoint and on with the data that follow the bad
    stretch; when that was done `rewinds` times without a new checkpoint in between, it stops.
    """

    window: int = 100  # taken steps that the limits look back on (a running mean); no limit before so many
    gradient_factor: float | None = 100.0  # refuse a gradient norm above so many times its mean
    spike_sigma: float | None = None  # refuse a loss so many standard deviations above its mean; e.g. 6
    in_a_row: int = 10
    rewinds: int = 2
    replicas_every: int = 1000  # steps between comparisons of what should be equal on several devices; 0: never

    def __post_init__(self):
        for name in ("window", "in_a_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("rewinds", "replicas_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, least in (("gradient_factor", 1.0), ("spike_sigma", 0.0)):
            value = getattr(self, name)
            if value is not None and not value > least:
                raise ValueError(f"{name} must be above {least:g} (or None), not {value:g}")

    def init(self) -> dict[str, Array]:
        """Statistics of the taken steps: their number, and running moments of loss and gradient norm."""
        return {name: jnp.zeros((), jnp.float32) for name in ("count", "loss_mean", "loss_variance", "gradient_mean")}

    def judge(
        self, seen: dict[str, Array], loss: Array, grad_norm: Array, metrics: Mapping[str, Array]
    ) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """Whether to take a step (bool scalar), the statistics if it is taken, and the limits it was held against."""
        limits = self.limits(seen)
        finite = [jnp.isfinite(x).all() for x in (loss, grad_norm, *metrics.values())]
        take = jnp.stack(finite).all() & (loss <= limits["loss"]) & (grad_norm <= limits["grad_norm"])
        # A plain mean over the first `window` steps, an exponential one from then on.
        rate = 1 / jnp.minimum(seen["count"] + 1, self.window)
        change = loss - seen["loss_mean"]
        following = {
            "count": jnp.minimum(seen["count"] + 1, self.window),
            "loss_mean": seen["loss_mean"] + rate * change,
            "loss_variance": (1 - rate) * (seen["loss_variance"] + rate * change**2),
            "gradient_mean": seen["gradient_mean"] + rate * (grad_norm - seen["gradient_mean"]),
        }
        return take, following, limits

    def limits(self, seen: dict[str, Array]) -> dict[str, Array]:
        """The largest loss and gradient norm that pass, float32 scalars; infinity where there is no limit (yet)."""
        known = seen["count"] >= self.window
        loss = gradient = jnp.float32(jnp.inf)
        if self.spike_sigma is not None:
            loss = seen["loss_mean"] + self.spike_sigma * jnp.sqrt(seen["loss_variance"])
        if self.gradient_factor is not None:
            gradient = self.gradient_factor * seen["gradient_mean"]
        return {"loss": jnp.where(known, loss, jnp.inf), "grad_norm": jnp.where(known, gradient, jnp.inf)}


def choose(take: Array, new: Any, old: Any) -> Any:
    """`new` where `take` is true, else `old`, leaf by leaf and bit for bit."""
    return jax.tree.map(lambda a, b: jnp.where(take, a, b), new, old)


def why_refused(values: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """In words, from a refused step's scalars; the terms of the loss come first: they say where it began."""
    order = sorted(values, key=lambda name: (not name.startswith("loss/"), name != "loss", name))
    bad = [name for name in order if not -float("inf") < values[name] < float("inf")]
    if bad:
        also = f" (also {', '.join(bad[1:])})" if bad[1:] else ""
        return f"{bad[0]} is {values[bad[0]]}{also}"
    over = [f"{name} is {values[name]:.4g}, over its limit {limits[name]:.4g}" for name in limits
            if values[name] > limits[name]]  # fmt: skip
    return " and ".join(over)
