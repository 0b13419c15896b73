"""What `deterministic=16` costs, and that it keeps its promise: `python -m bench.deterministic`, ten minutes.

On 1, 2, 4 and 8 of the eight virtual CPU devices of a process: the step of `deterministic=16` against that of
`deterministic=0`, taken in turn. "time" and "work" are medians of the ratio, of the wall clock and of the processor
time of all threads: the virtual devices share the cores of one machine, so work that all of them repeat shows in both,
as it would not on real ones. "products" is the ratio of the FLOPs of all matrix products and convolutions: networks
compute forward twice, and every device computes heads and loss. "parameters" is a digest of those after all steps, the
same on every line of a model if the promise holds.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from ssljax.config import Experiment, experiment, load_config
from ssljax.flops import matmul_flops
from ssljax.mesh import global_batch
from ssljax.run import Run

ROOT = Path(__file__).parent.parent
SHARDS = 16
VIT = "{'type': 'ViT', 'image_size': 32, 'patch': 4, 'width': 96, 'depth': 4, 'heads': 3, 'projection': 64}"
MODELS = {
    "SimCLR, ViT": ("configs/simclr.py:cifar10_mini_vit", ()),
    "SimCLR, ResNet": ("configs/simclr.py:cifar10_mini", ()),
    "CLIP, two transformers": ("configs/clip.py:scenes", (f"method.image={VIT}", "batch_size=256")),
}


def model(name: str, shards: int) -> Experiment:
    spec, overrides = MODELS[name]
    config = load_config(f"{ROOT / spec}", (*overrides, f"deterministic={shards}"))
    config.data.train, config.evals = None, {}
    return experiment(config)


def noise(run: Run) -> dict[str, np.ndarray]:
    """The global batch: pictures and captions of noise."""
    draw = np.random.default_rng(0)
    shapes = run.batch_shapes.items()
    return {name: draw.integers(0, 256, x.shape).astype(x.dtype) for name, x in shapes}


def compare(name: str, devices: int, repeats: int) -> dict[str, Any]:
    """On so many devices of this process."""
    turns = {}
    for shards in (0, SHARDS):
        run = Run(model(name, shards), jax.devices()[:devices])
        with jax.set_mesh(run.mesh):
            turns[shards] = (
                run,
                run.compile_step(),
                [run.init()],
                global_batch(noise(run), run.experiment.batch_size, run.mesh),
            )
    ratios: dict[str, list[float]] = {"time": [], "work": []}
    for repeat in range(repeats + 1):
        took = {}
        for shards, (run, step, state, batch) in turns.items():
            with jax.set_mesh(run.mesh):
                wall, work = time.perf_counter(), time.process_time()
                state[0] = jax.block_until_ready(step(state[0], batch)[0])
                took[shards] = {"time": time.perf_counter() - wall, "work": time.process_time() - work}
        if repeat:  # the first warms up
            for clock, values in ratios.items():
                values.append(took[SHARDS][clock] / took[0][clock])
    parameters = jax.tree.leaves(jax.device_get(turns[SHARDS][2][0].params))
    flops = {}
    for shards, (run, _, (state,), batch) in turns.items():
        with jax.set_mesh(run.mesh):
            flops[shards] = matmul_flops(run.step, state, batch)
    return {
        **{clock: (statistics.median(values), min(values), max(values)) for clock, values in ratios.items()},
        "memory": [turns[s][1].memory_analysis().temp_size_in_bytes for s in (0, SHARDS)],
        "products": flops[SHARDS] / flops[0],
        "digest": hashlib.sha256(b"".join(x.tobytes() for x in parameters)).hexdigest()[:12],
    }


def child(name: str, devices: int, repeats: int) -> dict[str, Any]:
    # Eight virtual devices even for one: the number of threads follows from it, and belongs to what must be equal.
    # Without the scheduler, as in the tests: with it, eight devices on few cores may block one another.
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    command = [sys.executable, "-m", "bench.deterministic", "--child", name]
    command += ["--devices", str(devices), "--repeats", str(repeats)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"which of {', '.join(MODELS)}; all by default")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(compare(options.child, options.devices, options.repeats)))
        return
    table = Table(title=f"deterministic={SHARDS} over deterministic=0; {os.cpu_count()} cores, jax {jax.__version__}")
    for column in ("model", "devices", "time", "work", "products", "temporary MiB", "parameters"):
        table.add_column(column)
    for name in options.models or MODELS:
        for devices in (1, 2, 4, 8):
            found = child(name, devices, options.repeats)
            clocks = ("{:.2f} ({:.2f} to {:.2f})".format(*found[clock]) for clock in ("time", "work"))
            memory = " -> ".join(f"{size / 2**20:,.0f}" for size in found["memory"])
            row = (name, str(devices), *clocks, f"{found['products']:.2f}", memory, found["digest"])
            print(*row, sep="; ", flush=True)
            table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
