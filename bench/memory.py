"""Predicted and measured memory of a training step on one CPU device: `JAX_PLATFORMS=cpu python -m bench.memory`.

Predicted: XLA's `memory_analysis` of the compiled step of configs/simclr.py:cifar10_mini. Measured: live arrays after a
step, and the growth of the process's peak resident size over the steps. The batch is zeros, no data is read.
"""

import resource

import jax
import jax.numpy as jnp

from ssljax.config import experiment, load_config
from ssljax.run import Run

MIB = 2**20


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    config = load_config("configs/simclr.py:cifar10_mini")
    config.data.train, config.evals = None, {}
    run = Run(experiment(config), jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        step = run.compile_step()
        found = step.memory_analysis()
        batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in run.batch_shapes.items()}
        state = jax.block_until_ready(run.init())
        before = peak()
        for _ in range(3):
            state, metrics, _ = jax.block_until_ready(step(state, batch))
    live = sum(x.nbytes for x in jax.tree.leaves((state, batch, metrics))) / MIB
    kept = (found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes) / MIB
    print(f"state, batch and metrics: predicted {kept:.2f} MiB; live arrays {live:.2f} MiB")
    print(f"temporaries: predicted {found.temp_size_in_bytes / MIB:.0f} MiB; peak RSS grew {peak() - before:.0f} MiB")


if __name__ == "__main__":
    main()
