"""The loop: the same run on any mesh, and what it leaves behind. What disturbs it: test_chaos, test_guard."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from small import clip, run_steps, simclr

from ssljax.checkpoint import CheckpointError, CheckpointStore
from ssljax.metrics import read_records
from ssljax.run import Run
from ssljax.train import train

ROOT = Path(__file__).parent.parent
MESHES = [
    (2, ()),
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


def test_twenty_steps_do_not_depend_on_who_finishes_the_views():
    """Host and device have the same draws, so the losses differ by the rounding of finished pictures to 8 bits."""
    losses = {
        host: run_steps(simclr("data.size=None", f"data.views.host={host}", "optim.lr=0.0"), 1, 20)[0]
        for host in ("crop", "augment")
    }
    np.testing.assert_allclose(losses["augment"], losses["crop"], rtol=2e-3)
    assert np.ptp(losses["crop"]) > 0.01


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


def test_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        CheckpointStore(tmp_path).record(3)


def test_batch_that_does_not_divide():
    with pytest.raises(
        ValueError, match=r"batch size 12 is not divisible by the 8 data shards of the mesh; use 8 or 16"
    ):
        Run(simclr("batch_size=12"), jax.devices())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(simclr("steps=3"), workdir, profile=(1, 2))
    return workdir


def test_what_a_run_leaves_behind(finished):
    assert json.loads((finished / "config.json").read_text())["method"]["type"] == "SimCLR"
    assert "encoder/stem_conv/kernel" in (finished / "parameters.txt").read_text()
    record = read_records(finished)[-1]
    for name in (
        *("loss", "grad_norm", "learning_rate", "goodput"),
        *("images_per_second", "data_wait", "flops_per_second_per_device"),
    ):
        assert np.isfinite(record[name]), name
    assert {"collapse/std", "collapse/rank", "collapse/alignment", "collapse/uniformity"} <= record.keys()
    assert list((finished / "tensorboard").iterdir())
    assert list((finished / "profile").rglob("*.xplane.pb"))


def test_a_finished_run_is_left_alone(finished):
    records = (finished / "metrics.jsonl").read_text()
    assert int(train(simclr("steps=3"), finished).state.step) == 3
    assert (finished / "metrics.jsonl").read_text() == records


def test_checkpoints_of_another_config_are_refused(finished):
    """Before anything is compiled."""
    with pytest.raises(
        CheckpointError,
        match=r"another config.*\n.*projector/fc2/kernel: float32\[16,8\] in the checkpoint, float32\[16,12\] ",
    ):
        train(simclr("steps=4", "method.projector.out_dim=12"), finished)
    assert CheckpointStore(finished).steps() == [3]
