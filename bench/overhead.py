"""What the loop costs beside the training step: `JAX_PLATFORMS=cpu python -m bench.overhead`.

A tiny network on pictures that are not augmented, so that the host's work shows: dispatch, the Python loop, logging and
the loader. Every row is the real `train()` (or what it is compared with), run in turn; figures are milliseconds a step
between step 50 and the 50th before the last. With `SSLJAX_DATA` also CIFAR-10 from its JPEGs.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from ssljax.config import Experiment, experiment, load_config
from ssljax.metrics import read_records
from ssljax.run import Run
from ssljax.train import train

TINY = (
    "method.encoder.blocks=(1,)",
    "method.encoder.channels=(4,)",
    "method.projector.hidden=(16,)",
    "method.projector.out_dim=8",
    "data.views.views={'x1': {'size': 8, 'crop': 'none'}, 'x2': {'size': 8, 'crop': 'none', 'flip': 0.5}}",
    "data.size=8",
    "evals={}",
)
SKIP = 50  # steps at either end
Batch = dict[str, np.ndarray]


def tiny(variant: str, steps: int, *overrides: str) -> Experiment:
    config = Path(__file__).parent.parent / "configs/simclr.py"
    return experiment(load_config(f"{config}:{variant}", (*TINY, f"steps={steps}", *overrides)))


class Same:
    """One batch again and again, in place of the loader."""

    def __init__(self, batch: Batch):
        self._batch = batch

    def __next__(self) -> Batch:
        return self._batch


def one_batch(e: Experiment) -> Batch:
    return next(Run(e).batches(0))


def bare(e: Experiment, batch: Batch, place: bool) -> float:
    """ms a step of `for ...: state = step(state, batch)`; with `place` the batch comes from the host each time."""
    run = Run(e)
    with jax.set_mesh(run.mesh):
        step, state = run.compile_step(), run.init()
        placed = run.place(batch)
        for i in range(e.steps - SKIP):
            if i == SKIP:
                jax.block_until_ready(state)
                start = time.perf_counter()
            state, *_ = step(state, run.place(batch) if place else placed)
        jax.block_until_ready(state)
    return 1e3 * (time.perf_counter() - start) / (e.steps - 2 * SKIP)


def loop(e: Experiment, batch: Batch | None = None) -> float:
    """ms a step of `train()`, by its own log; with `batch` there is no loader, only this batch again and again."""
    fixed = patch.object(Run, "batches", lambda *_: Same(batch)) if batch else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as workdir, fixed, open(os.devnull, "w") as silence:
        with contextlib.redirect_stdout(silence):
            train(e, workdir)
        times = {record["step"]: record["time"] for record in read_records(workdir)}
    return 1e3 * (times[e.steps - SKIP] - times[SKIP]) / (e.steps - 2 * SKIP)


def loader(e: Experiment) -> float:
    """ms a batch of the loader alone."""
    batches = Run(e).batches(0)
    for i in range(e.steps - SKIP):
        if i == SKIP:
            start = time.perf_counter()
        next(batches)
    elapsed = time.perf_counter() - start
    batches.close()
    return 1e3 * elapsed / (e.steps - 2 * SKIP)


def overhead_rows(steps: int) -> Iterator[tuple[str, Callable[[], float]]]:
    e = tiny("digits", steps, "batch_size=16", "log_every=50")
    batch = one_batch(e)
    yield "bare loop, one batch on the device", partial(bare, e, batch, False)
    yield "bare loop, one batch from the host", partial(bare, e, batch, True)
    yield "train(), one batch, logging every 50 steps", partial(loop, e, batch)
    every_step = tiny("digits", steps, "batch_size=16", "log_every=1")
    yield "train(), one batch, logging every step", partial(loop, every_step, batch)
    yield "train(), digits through the loader", partial(loop, e)


def loader_rows(steps: int) -> Iterator[tuple[str, Callable[[], float]]]:
    # Few enough pictures that the cache is full before the clock starts.
    train = {"type": "Npz", "path": "$SSLJAX_DATA/cifar10/train.npz", "limit": 32 * SKIP}
    settings = "batch_size=64", "log_every=50", f"data.train={train}"
    jpeg, cached = (tiny("cifar10_mini", steps, *settings, f"data.loader.cache={c}") for c in (False, True))
    yield "train(), one batch", partial(loop, jpeg, one_batch(jpeg))
    yield "train(), JPEGs decoded for each use", partial(loop, jpeg)
    yield "train(), decoded once (cache)", partial(loop, cached)
    yield "loader alone, JPEGs decoded for each use", partial(loader, jpeg)
    yield "loader alone, decoded once (cache)", partial(loader, cached)


def measure(title: str, rows: dict[str, Callable[[], float]], repeats: int, console: Console) -> None:
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, run in rows.items():
            times[name].append(run())
    table = Table("", "median ms", "min", "max", "steps/s", title=title, title_justify="left")
    for name, values in times.items():
        median = statistics.median(values)
        table.add_row(name, *(f"{x:.2f}" for x in (median, min(values), max(values))), f"{1e3 / median:,.0f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    if options.steps % SKIP or options.steps < 3 * SKIP:
        parser.error(f"--steps must be a multiple of {SKIP}, and at least {3 * SKIP}")
    console = Console(width=120)
    device = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), {os.cpu_count()} cores"
    with tempfile.TemporaryDirectory() as cache:
        # Each repeat compiles the same programs.
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        measure(f"The loop: digits, batch 16, {device}", dict(overhead_rows(options.steps)), options.repeats, console)
        if "SSLJAX_DATA" in os.environ:
            title = f"The loader: CIFAR-10 JPEGs, batch 64, {device}"
            measure(title, dict(loader_rows(options.steps)), options.repeats, console)


if __name__ == "__main__":
    main()
