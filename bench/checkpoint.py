"""What verified checkpoints find, and what they cost: `JAX_PLATFORMS=cpu python -m bench.checkpoint`.

1. Bits flipped one at a time in a saved checkpoint of a small run, and what a restart makes of it. Half of them are
   spread evenly over all bytes, half over all files. Beside it: the same files loaded by Orbax alone.
2. Saving and restoring a ViT-B/16 with Adam (1 GiB), beside Orbax alone, in turn; a save ends when all is on the disk.
3. How long a save stalls the training loop, against a step of that ViT-B: the calls of the loop, and what the next step
   takes longer than others (its outputs need new memory while the old state is being written).

Give `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, which `ssljax` sets by itself.
"""

import argparse
import logging
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from rich.console import Console
from rich.table import Table

from ssljax.checkpoint import Checkpoints, CheckpointStore
from ssljax.config import experiment, load_config
from ssljax.digest import digest_tree
from ssljax.mesh import abstract_like
from ssljax.run import Run
from ssljax.soundness import Soundness
from ssljax.state import TrainState

CONFIG = Path(__file__).parent.parent / "configs/simclr.py"
SMALL = ("method.encoder.blocks=(1,)", "method.encoder.channels=(8,)", "method.projector.hidden=(16,)")
GIB = 2**30


def make_run(variant: str, *overrides: str) -> Run:
    return Run(experiment(load_config(f"{CONFIG}:{variant}", ("evals={}", *overrides))), jax.devices()[:1])


def equal(a: TrainState, b: TrainState) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=True), a, b)))


def flips(folder: Path, count: int) -> list[tuple[Path, int]]:
    rng = random.Random(0)
    sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    files = [path for path in sizes if sizes[path]]
    weights = [sizes[path] for path in files]
    chosen = rng.choices(files, weights, k=count // 2) + rng.choices(files, k=count - count // 2)
    return [(file, rng.randrange(8 * sizes[file])) for file in chosen]


def find_flips(count: int, console: Console) -> None:
    run = make_run("digits", *SMALL)
    like = abstract_like(run.state_shapes, run.state_shardings)
    ours: Counter[str] = Counter()
    orbax: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as workdir, CheckpointStore(workdir) as store:
        states = {
            step: jax.tree.map(lambda x, step=step: x + jnp.asarray(step, x.dtype), run.init()) for step in (1, 2)
        }
        store.resume(like, print)
        for step, state in states.items():
            store.save(state, step, {"position": step}, run.metadata())
        store.wait()
        folder = Path(workdir, "checkpoints/2")
        began = time.perf_counter()
        for file, bit in flips(folder, count):
            whole = file.read_bytes()
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            restored = store.newest_good(partial(store.restore, like), lambda _: None)
            ours["found" if restored.step == 1 and equal(restored.state, states[1]) else "missed"] += 1
            try:
                loaded: Any = ocp.load_checkpointables(folder, {"state": like})["state"]
                orbax["harmless" if equal(loaded, states[2]) else "missed"] += 1
            except Exception:
                orbax["found"] += 1
            file.write_bytes(whole)
        assert store.restore(like).step == 2
    table = Table("", "found", "harmless", "missed", title=f"{count} flipped bits, one at a time", title_justify="left")
    for name, counts in (("verified: the step before is restored", ours), ("Orbax alone: an error", orbax)):
        table.add_row(name, *(str(counts[kind]) for kind in ("found", "harmless", "missed")))
    console.print(
        table, f"in {time.perf_counter() - began:.0f} s; harmless: the right state is loaded; missed: another\n"
    )


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def row(table: Table, name: str, values: list[float], base: list[float] | None = None) -> None:
    ratio = f"{statistics.median(values) / statistics.median(base):.3f}" if base else ""
    table.add_row(name, *(f"{x:.2f}" for x in (statistics.median(values), min(values), max(values))), ratio)


def costs(state: TrainState, run: Run, repeats: int, console: Console) -> None:
    like = abstract_like(run.state_shapes, run.state_shardings)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / GIB
    digest = [seconds(lambda: digest_tree(state)) for _ in range(1 + repeats)]
    save: dict[str, list[float]] = {"Orbax alone": [], "verified": []}
    restore: dict[str, list[float]] = {"Orbax alone": [], "verified": []}
    with tempfile.TemporaryDirectory() as workdir, CheckpointStore(workdir, Checkpoints(keep_last=100)) as store:
        store.resume(like, print)
        plain = Path(workdir, "plain")

        def save_plain() -> None:
            ocp.save_checkpointables_async(plain, {"state": state}, custom_metadata=run.metadata()).result()

        def save_verified() -> None:
            store.save(state, 1, {"position": 0}, run.metadata())
            store.wait()

        kinds = {
            "Orbax alone": (save_plain, lambda: ocp.load_checkpointables(plain, {"state": like}), plain),
            "verified": (save_verified, lambda: store.restore(like).state, Path(workdir, "checkpoints/1")),
        }
        for i in range(1 + repeats):  # the first round only warms up
            for name in list(kinds)[:: 1 if i % 2 else -1]:
                write, read, folder = kinds[name]
                os.sync()
                times = seconds(write), seconds(read)
                shutil.rmtree(folder)
                if i:
                    save[name].append(times[0])
                    restore[name].append(times[1])
    title = f"A state of {size:.2f} GiB in {len(jax.tree.leaves(state))} arrays, {repeats} times in turn"
    table = Table("", "median s", "min", "max", "ratio", title=title, title_justify="left")
    for what, times in (("save", save), ("restore", restore)):
        for name, values in times.items():
            row(table, f"{what}, {name}", values, times["Orbax alone"])
    row(table, f"digests of the arrays ({size / statistics.median(digest[1:]):.1f} GiB/s)", digest[1:])
    console.print(table)


def stall(state: TrainState, run: Run, repeats: int, console: Console) -> None:
    batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in run.batch_shapes.items()}
    step_fn, soundness = run.compile_step(), Soundness(run.state_shapes, run.state_shardings, run.mesh)
    steps: list[float] = []
    calls: list[float] = []
    after: list[float] = []

    def step() -> float:
        nonlocal state
        began = time.perf_counter()
        state = jax.block_until_ready(step_fn(state, batch))[0]
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as workdir, CheckpointStore(workdir, Checkpoints(keep_last=1)) as store:
        store.resume(abstract_like(run.state_shapes, run.state_shardings), print)
        step()
        for i in range(1 + repeats):
            steps.append(step())
            began = time.perf_counter()
            soundness.check_finite(state)
            store.save(state, i, {"position": 0}, run.metadata())
            calls.append(time.perf_counter() - began)
            after.append(step())
            store.wait()
    usual = statistics.median(steps[1:])
    title = f"ViT-B/16, SimCLR, batch {run.experiment.batch_size} (two views each): stall of the loop by a save"
    table = Table("", "median s", "min", "max", "of a step", title=title, title_justify="left")
    row(table, "a step", steps[1:])
    row(table, "the calls of check_finite and save", calls[1:], steps[1:])
    row(table, "what the next step takes longer", [x - usual for x in after[1:]], steps[1:])
    row(table, "both", [x + y - usual for x, y in zip(calls[1:], after[1:], strict=True)], steps[1:])
    console.print(table)


def quiet() -> None:
    """Orbax alone leaves tasks behind when it fails, which complain on every channel."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    quiet()
    console = Console(width=120)
    device = jax.devices()[0].device_kind
    console.print(f"{device}, {os.cpu_count()} cores; jax {jax.__version__}\n")
    if options.flips:
        find_flips(options.flips, console)
    if options.repeats:
        vit = "method.encoder={'type': 'ViT', 'size': 'B', 'patch': 16}"
        run = make_run(
            "images", vit, f"batch_size={options.batch}", "optim.name=adamw", "optim.lr=1e-4", "optim.warmup=1"
        )
        with jax.set_mesh(run.mesh):
            state = jax.block_until_ready(run.init())
            costs(state, run, options.repeats, console)
            stall(state, run, options.repeats, console)


if __name__ == "__main__":
    main()
