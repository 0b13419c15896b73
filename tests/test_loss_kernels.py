"""The Pallas kernels give what the sweep gives (interpreted, on CPU), and compile for TPUs that are not here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import quick_compilation  # noqa: F401

from ssljax.losses import kernels, sweep
from ssljax.losses.laws import DistillationLaw, SigmoidLaw, SoftmaxLaw
from ssljax.losses.sweep import Results, Tower

ROWS, COLUMNS, WIDTH = 256, 384, 128
LAWS = {
    "clip": (SoftmaxLaw(columns=True, counted="different"), None),
    "classes": (SoftmaxLaw(columns=True, positives=True), None),
    "itself": (SoftmaxLaw(columns=False, counted="others", positives=True), None),
    "sigmoid": (SigmoidLaw(), -2.0),
    "distillation": (DistillationLaw(columns=True), None),
}


def tower(seed, n, dtype, teacher=True):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, WIDTH))
    return Tower(
        jnp.asarray(x, dtype),
        jnp.asarray(4 / np.linalg.norm(x, axis=1), jnp.float32),
        jnp.asarray(rng.integers(0, 50, n), jnp.int32),
        jnp.arange(n, dtype=jnp.int32),
        jnp.asarray(rng.random(n) < 0.7),
        tower(seed + 10, n, dtype, teacher=False) if teacher else None,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAWS)
def test_kernels_equal_the_sweep(name, dtype):
    law, bias = LAWS[name]
    rows, columns = tower(0, ROWS, dtype), tower(1, COLUMNS, dtype)
    bias = None if bias is None else jnp.float32(bias)
    want = sweep.forward(law, rows, columns, bias, 128)
    got = kernels.forward(law, rows, columns, bias, 128, interpret=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)

    rng = np.random.default_rng(2)

    def results(stats):
        values = law.finish(stats)
        return Results(values, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), values))

    both = [results(stats) for stats in want]
    want = sweep.backward(law, rows, columns, bias, *both, 128)
    got = kernels.backward(law, rows, columns, bias, *both, 256, interpret=True)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


def test_sizes():
    small = Tower(jnp.ones((96, 128)), jnp.ones(96))
    assert not kernels.fits(small, small)
    assert kernels.fits(*(tower(0, 256, "float32"),) * 2)


PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ssljax import losses
from ssljax.losses import sharded

sharded.TPU_KERNELS = True
devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
mesh = jax.make_mesh((2, 2, 1), ("replica", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)
by_rows, whole = NamedSharding(mesh, PartitionSpec(("replica", "fsdp"))), NamedSharding(mesh, PartitionSpec())
scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
for dtype in (jnp.float32, jnp.bfloat16):
    x = jax.ShapeDtypeStruct((8192, 512), dtype, sharding=by_rows)
    for loss in (losses.clip_softmax, lambda a, b, s: losses.sigmoid(a, b, s, s)):
        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(x, x, scale)
            assert lowered.as_text().count("tpu_custom_call") == 3, "forward, gradient of the rows, of the columns"
            lowered.compile()
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'ssljax[tpu]'")
@pytest.mark.parametrize(("topology", "kind"), [("v5e:2x2", "v5litepod-4"), ("v6e:2x2", "v6e-4")])
def test_they_compile_for_a_tpu(topology, kind):
    """The losses themselves, on four chips, in a process of its own: the TPU compiler reads its setting only once."""
    setting = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": kind, "TPU_WORKER_HOSTNAMES": "localhost"}
    setting["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # beside a test that compiles for another topology
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology],
        env=os.environ | setting | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path[1:]])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
