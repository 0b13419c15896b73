"""What a run says of itself before it starts: config, parameters and where they live, learning-rate rule, devices."""

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import psutil
from etils import epath

from ssljax.metrics import MetricLog
from ssljax.optim import Optim, parameter_rules
from ssljax.rules import names

if TYPE_CHECKING:
    from ssljax.run import Run


def parameter_table(params: Any, shardings: Any, optim: Optim) -> str:
    """A line per parameter: name, shape, sharding, learning-rate multiplier, weight decay; totals at the end.

    `params` may be arrays or shapes.
    """
    rules = parameter_rules(optim, params)
    leaves = [
        jax.tree.leaves(t) for t in (names(params), params, shardings, rules.multiplier, rules.decays, rules.frozen)
    ]
    rows = [("name", "shape", "parameters", "sharding", "lr x", "weight decay")]
    total = 0
    for name, leaf, sharding, multiplier, decays, frozen in zip(*leaves, strict=True):
        size = math.prod(leaf.shape)
        total += size
        where = ", ".join(str(axis) for axis in sharding.spec) or "replicated"
        rows.append(
            (
                name,
                str(tuple(leaf.shape)),
                f"{size:,}",
                where,
                _multiplier(multiplier, frozen),
                f"{optim.weight_decay * decays:g}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"{total:,} parameters in {len(rows) - 1} arrays"])


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf of a resolved config: what an override on the command line would set."""
    if isinstance(config, dict) and config:
        for name, value in config.items():
            yield from flatten(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, config


def _multiplier(multiplier: Any, frozen: bool) -> str:
    if frozen:
        return "frozen"
    values = np.unique(np.asarray(multiplier))
    return f"{values[0]:.3g}" if values.size == 1 else f"{values[0]:.3g}..{values[-1]:.3g}"


def describe(log: MetricLog, run: "Run", workdir: epath.Path, start: int, before: dict | None = None) -> None:
    """Prints a run's outline and saves `config.json` and `parameters.txt` in its workdir.

    `before`: the config of the checkpoint that the run resumes from; what differs is printed.
    """
    if jax.process_index():
        return
    e = run.experiment
    table = parameter_table(run.state_shapes.params, run.state_shardings.params, e.optim)
    config = json.dumps(run.config, indent=1)
    (workdir / "config.json").write_text(config + "\n")
    (workdir / "parameters.txt").write_text(table + "\n")
    device = run.mesh.devices.flat[0]
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    log.say("\n".join(f"{name} = {value!r}" for name, value in flatten(run.config)))
    log.say(table)
    log.say(
        f"{type(e.method).__name__} on {run.mesh.size} {device.device_kind} device(s), "
        f"{jax.process_count()} process(es); "
        f"mesh {mesh}; {e.precision}; batch {e.batch_size}; {e.optim.name}, {e.optim.explain_lr(e.batch_size)}"
    )
    log.say(_memory_of_batches(run))
    if (parts := e.micro_batches * max(e.deterministic, 1)) > 1:
        part = e.batch_size // parts
        of = f" of {e.deterministic} logical shards" if e.deterministic else ""
        log.say(f"encoding {parts} micro-batches of {part}{of}, one loss over all {e.batch_size} rows")
        if any(name.split("/")[-1] == "var" for name in jax.tree.leaves(names(run.state_shapes.method))):
            log.say(
                f"batch normalisation of the encoders sees {part} rows at a time: this is not the full batch's gradient"
            )
    if before is not None:
        old, new = dict(flatten(before)), dict(flatten(run.config))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                log.say(f"changed since the checkpoint: {name} = {old.get(name)!r} -> {new.get(name)!r}")
    log.say(f"{'resuming at' if start else 'starting from'} step {start} of {e.steps}; files in {workdir}")


def _memory_of_batches(run: "Run") -> str:
    """What the loader needs at most; a warning where this machine may not have it."""
    loader, shapes = run.experiment.data.loader, run.batch_shapes.values()
    batch = sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes) * len(run.rows) / run.experiment.batch_size
    most, free = loader.held * batch, psutil.virtual_memory().available
    text = (
        f"the loader holds at most {loader.held} batches of {batch / 2**20:,.1f} MiB: {most / 2**30:.2f} GiB a process"
    )
    if loader.cache:
        text += ", and every record it has read (data.loader.cache)"
    if most > free:
        text += f"; only {free / 2**30:.2f} GiB are free: lower data.loader.prefetch, threads or workers"
    return text
