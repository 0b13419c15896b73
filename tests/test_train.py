"""The loop: the same run on any mesh, killed and resumed exactly, stopped by NaN, several processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from small import SIMCLR, clip, run_steps, simclr

from ssljax.checkpoint import CheckpointError, CheckpointStore, abstract_like
from ssljax.flight import DivergedError
from ssljax.metrics import read_records
from ssljax.run import Run
from ssljax.train import train

ROOT = Path(__file__).parent.parent
MESHES = [
    (2, ()),
    (4, ()),
    (8, ()),
    (8, ("mesh.replica=2", "mesh.fsdp=4", "mesh.min_size=64")),
    (8, ("mesh.fsdp=2", "mesh.tensor=2", "mesh.min_size=64")),
]


@pytest.fixture(scope="module")
def one_device():
    return {"simclr": run_steps(simclr(), 1, 20)[0], "clip": run_steps(clip(), 1, 20)[0]}


@pytest.mark.parametrize(("devices", "mesh"), MESHES)
@pytest.mark.parametrize("make", [simclr, clip])
def test_twenty_steps_do_not_depend_on_the_mesh(one_device, make, devices, mesh):
    """SimCLR has batch normalisation: its statistics are those of the global batch."""
    losses, _ = run_steps(make(*mesh), devices, 20)
    np.testing.assert_allclose(losses, one_device[make.__name__], rtol=1e-5)


def test_state_is_sharded_not_copied():
    e = simclr("mesh.replica=1", "mesh.fsdp=8", "mesh.min_size=64", "optim.ema=0.9")
    run = Run(e, jax.devices())
    with jax.set_mesh(run.mesh):
        state = run.init()
    kernel = state.params["encoder"]["stage1_block0"]["conv2"]["kernel"]
    moment = state.opt[0].mu["encoder"]["stage1_block0"]["conv2"]["kernel"]
    average = state.ema["encoder"]["stage1_block0"]["conv2"]["kernel"]
    for array in (kernel, moment, average):
        assert array.addressable_shards[0].data.size * 8 == array.size


# ---------------------------------------------------------------------------------------------------- real processes


def command(workdir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "ssljax.cli", "train", "--config", "configs/simclr.py:digits", "--workdir",
            str(workdir),
            "--no-report", *SIMCLR, *overrides]  # fmt: skip


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def deterministic(workdir: Path) -> list[dict]:
    """The records without what depends on the clock."""
    clock = ("time", "per_second", "data_wait")
    return [{k: v for k, v in r.items() if not any(c in k for c in clock)} for r in read_records(workdir)]


def final_state(workdir: Path):
    run = Run(simclr(), jax.devices()[:1])
    return CheckpointStore(workdir).restore(abstract_like(run.state_shapes, run.state_shardings))


def saved_steps(workdir: Path) -> list[int]:
    return CheckpointStore(workdir).steps()


CHECKPOINTS = ("checkpoint.every=3", "checkpoint.keep_last=20")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    subprocess.run(command(workdir, *CHECKPOINTS), cwd=ROOT, env=environment(), check=True, capture_output=True)
    return workdir


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that got SIGKILL somewhere after its second checkpoint."""
    workdir = tmp_path_factory.mktemp("killed")
    log = workdir / "metrics.jsonl"
    until = random.Random(os.getpid()).randint(7, 17)
    process = subprocess.Popen(
        command(workdir, *CHECKPOINTS),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while time.time() < deadline and not (log.exists() and f'"step": {until},' in log.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert saved_steps(workdir)[-1] < 20
    return workdir


def test_a_killed_run_resumes_bit_for_bit(unbroken, killed, tmp_path):
    workdir = tmp_path / "resumed"
    shutil.copytree(killed, workdir)
    subprocess.run(command(workdir, *CHECKPOINTS), cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert deterministic(workdir) == deterministic(unbroken)
    resumed, expected = final_state(workdir), final_state(unbroken)
    assert resumed.progress == expected.progress
    assert resumed.progress["position"] == 20 * 16
    jax.tree.map(np.testing.assert_array_equal, resumed.state, expected.state)


def test_a_killed_run_resumes_on_four_devices(unbroken, killed, tmp_path):
    workdir = tmp_path / "resumed"
    shutil.copytree(killed, workdir)
    start = saved_steps(workdir)[-1]
    train(simclr(*CHECKPOINTS, "mesh.fsdp=2", "mesh.min_size=64"), workdir, devices=jax.devices()[:4])
    after = lambda d: [r["loss"] for r in deterministic(d) if r["step"] > start]  # noqa: E731
    assert len(after(workdir)) == 20 - start
    np.testing.assert_allclose(after(workdir), after(unbroken), rtol=1e-6)


def test_two_processes_are_one_run(unbroken, tmp_path):
    """launch/local.sh: each process reads its own rows only, and the losses are those of one process."""
    workdir = tmp_path / "two"
    subprocess.run(
        ["bash", "launch/local.sh", "2", *command(workdir, *CHECKPOINTS)],
        cwd=ROOT,
        env=environment(),
        check=True,
        timeout=300,
    )
    losses = lambda d: [r["loss"] for r in read_records(d)]  # noqa: E731
    np.testing.assert_allclose(losses(workdir), losses(unbroken), rtol=1e-5)
    found, expected = final_state(workdir), final_state(unbroken)
    assert found.progress == expected.progress
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)  # noqa: E731
    jax.tree.map(close, found.state.params, expected.state.params)


# ---------------------------------------------------------------------------------------------------------- bad days


def test_nan_stops_the_run_with_step_and_term(tmp_path):
    e = simclr("optim.lr=1e30", "checkpoint.every=1", "log_every=20")
    with pytest.raises(
        DivergedError, match=r"step \d+: 10 steps in a row were refused.*: (loss|grad_norm) is (nan|inf)"
    ):
        train(e, tmp_path)
    # What was saved is from before.
    run = Run(e, jax.devices()[:1])
    store = CheckpointStore(tmp_path)
    for step in store.steps():
        state = store.restore(abstract_like(run.state_shapes, run.state_shardings), step).state
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_checkpoints_of_another_config_are_refused(tmp_path):
    train(simclr("steps=2"), tmp_path)
    before = saved_steps(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"another config.*\n.*projector/fc2/kernel: float32\[16,8\] in the checkpoint, float32\[16,12\] ",
    ):
        train(simclr("steps=4", "method.projector.out_dim=12"), tmp_path)
    assert saved_steps(tmp_path) == before


def test_a_finished_run_is_left_alone(tmp_path):
    e = simclr("steps=2")
    train(e, tmp_path)
    records = (tmp_path / "metrics.jsonl").read_text()
    assert int(train(e, tmp_path).state.step) == 2
    assert (tmp_path / "metrics.jsonl").read_text() == records


def test_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        CheckpointStore(tmp_path).record(3)


def test_batch_that_does_not_divide():
    with pytest.raises(
        ValueError, match=r"batch size 12 is not divisible by the 8 data shards of the mesh; use 8 or 16"
    ):
        Run(simclr("batch_size=12"), jax.devices())


def test_old_checkpoints_go_and_milestones_stay(tmp_path):
    train(simclr("steps=10", "checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=4"), tmp_path)
    assert saved_steps(tmp_path) == [4, 8, 9, 10]


def test_what_a_run_leaves_behind(tmp_path):
    train(simclr("steps=3"), tmp_path, profile=(1, 2))
    assert json.loads((tmp_path / "config.json").read_text())["method"]["type"] == "SimCLR"
    assert "encoder/stem_conv/kernel" in (tmp_path / "parameters.txt").read_text()
    record = read_records(tmp_path)[-1]
    for name in ("loss", "grad_norm", "learning_rate", "images_per_second", "data_wait", "flops_per_second_per_device"):
        assert np.isfinite(record[name]), name
    assert {"collapse/std", "collapse/rank", "collapse/alignment", "collapse/uniformity"} <= record.keys()
    assert list((tmp_path / "tensorboard").iterdir())
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
