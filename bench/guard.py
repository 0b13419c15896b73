"""What soundness costs a run without faults: `JAX_PLATFORMS=cpu python -m bench.guard`.

The guard: a step with it and one without it, in turn; the medians of their ratios, in wall-clock time and in CPU
seconds. The first column compares two copies of the step without it, so it says how far the figures can be trusted.
The comparison of copies: on two virtual devices, its time over a step's, also spread over `guard.replicas_every` steps.

With `--topology v5e:2x2` nothing is run: both steps are compiled for these chips, and the bytes that they move between
a chip and its main memory are read off, as `ssljax plan` does.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 --xla_cpu_enable_concurrency_optimized_scheduler=false"
)

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from ssljax.chips import Topology
from ssljax.config import Experiment, experiment, load_config
from ssljax.guard import Guard
from ssljax.hlo import Program
from ssljax.mesh import batch_sharding
from ssljax.run import Run
from ssljax.soundness import Soundness


def vit(size: int, batch: int) -> tuple[str, ...]:
    sizes = [f"{name}.size={size}" for name in ("data", *(f"data.views.views.{x}" for x in ("x1", "x2")))]
    encoder = {"type": "ViT", "size": "S", "patch": 16, "image_size": size}
    return (f"method.encoder={encoder}", *sizes, f"data.eval_view.views.image.size={size}", f"batch_size={batch}")


Models = dict[str, tuple[str, tuple[str, ...]]]
MODELS: Models = {
    "cifar10_mini (a small ResNet), batch 256": ("configs/simclr.py:cifar10_mini", ()),
    "SimCLR, ViT-S/16, 64 pixels, batch 16": ("configs/simclr.py:digits", vit(64, 16)),
    "SimCLR, ViT-S/16, 224 pixels, batch 8": ("configs/simclr.py:digits", vit(224, 8)),
}
ON_CHIPS: Models = {
    **MODELS,
    "SimCLR, ViT-S/16, 224 pixels, batch 64": ("configs/simclr.py:digits", vit(224, 64)),
    "SimCLR, ViT-S/16, 224 pixels, batch 64, clipped": ("configs/simclr.py:digits", (*vit(224, 64), "optim.clip=1.0")),
}


@dataclass(frozen=True)
class NoGuard(Guard):
    """Takes every step: XLA then drops the choice, and the rest of the guard with it."""

    def judge(self, seen: Any, loss: Any, grad_norm: Any, metrics: Any) -> Any:
        return jnp.bool_(True), seen, {"loss": jnp.float32(0), "grad_norm": jnp.float32(0)}


class Turn:
    """A compiled step and its state."""

    def __init__(self, e: Experiment, devices: int):
        self.run = Run(e, jax.devices()[:devices])
        self.soundness = Soundness(self.run.state_shapes, self.run.state_shardings, self.run.mesh)
        with jax.set_mesh(self.run.mesh):
            self.step, self.state = self.run.compile_step(), self.run.init()
            draw = np.random.default_rng(0)
            self.batch = {
                name: jax.device_put(draw.integers(0, 2, x.shape).astype(x.dtype), batch_sharding(self.run.mesh))
                for name, x in self.run.batch_shapes.items()
            }
            self.batch["stop"] &= False

    def __call__(self) -> tuple[float, float]:
        """(wall-clock seconds, CPU seconds) of a step."""
        with jax.set_mesh(self.run.mesh):
            return timed(self._take)

    def compare_copies(self) -> float:
        """Wall-clock seconds."""
        with jax.set_mesh(self.run.mesh):
            return timed(lambda: self.soundness.check_copies(self.state))[0]

    def _take(self) -> None:
        self.state = jax.block_until_ready(self.step(self.state, self.batch)[0])


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def compiled(topology: Topology) -> Table:
    """The batch is that of the table on each chip."""
    chips = len(topology.devices)
    table = Table(title=f"guard on over off, compiled for {topology.name}, jax {jax.__version__}")
    for column in ("model", "main memory moved, off", "on / off"):
        table.add_column(column)
    for name, e in experiments(ON_CHIPS):
        e = replace(e, batch_size=chips * e.batch_size)
        off, on = (
            Program(Run(each, topology.devices).compile_step("tpu" if topology.tpu else None).as_text()).traffic
            for each in (replace(e, guard=NoGuard()), e)
        )
        table.add_row(f"{name} on each chip", f"{off / 1e9:.2f} GB", f"{on / off:.4f}")
    return table


def timings(repeats: int) -> Table:
    table = Table(title=f"guard on over off; {os.cpu_count()} cores, jax {jax.__version__}, medians of {repeats}")
    for column in ("model", "off / off", "on / off", "on / off, CPU seconds", "comparison / step", "spread over steps"):
        table.add_column(column)
    for name, e in experiments(MODELS):
        off = replace(e, guard=NoGuard())
        turns = [Turn(off, 1), Turn(off, 1), Turn(e, 1)]
        times = np.array([[turn() for turn in turns] for _ in range(repeats + 2)])[2:]  # [repeat, turn, clock]
        ratios = np.median(times[:, 1:] / times[:, :1], axis=0)
        assert int(turns[2].state.step) == repeats + 2, "a step was refused"
        two = Turn(e, 2)
        share = statistics.median(two.compare_copies() / two()[0] for _ in range(6))
        table.add_row(
            name,
            *(f"{x:.3f}" for x in (ratios[0, 0], ratios[1, 0], ratios[1, 1])),
            f"{share:.2f}",
            f"{share / e.guard.replicas_every:.3%}",
        )
    return table


def experiments(models: Models) -> Iterator[tuple[str, Experiment]]:
    for name, (spec, overrides) in models.items():
        config = load_config(spec, overrides)
        config.data.train, config.evals = None, {}
        yield name, experiment(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--topology", type=Topology.parse, help="compile for these chips, and run nothing")
    options = parser.parse_args()
    Console(width=140).print(compiled(options.topology) if options.topology else timings(options.repeats))


if __name__ == "__main__":
    main()
