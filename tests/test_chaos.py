"""Real processes, killed, told to stop, frozen, moved to other devices: the run comes back exact. See bench.chaos."""

import os
import random
import signal
import subprocess

import numpy as np
import pytest

from bench.chaos import PATIENCE, ROOT, Campaign, Training, write_shards
from ssljax.metrics import read_records
from ssljax.preemption import AGAIN
from ssljax.watchdog import LOST

OVERRIDES = ("steps=24",)
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def make(source, tmp_path_factory):
    def training(processes: int = 1, *overrides: str) -> Training:
        return Training(tmp_path_factory.mktemp("run"), source, processes, (*OVERRIDES, *overrides), QUICK)

    return training


@pytest.fixture(scope="module")
def one(make):
    """The undisturbed run of one process, and its outcome."""
    training = make()
    training.finish()
    return training, training.outcome()


@pytest.fixture(scope="module")
def two(make):
    training = make(2)
    training.finish()
    return training, training.outcome()


def losses(training: Training) -> list[float]:
    return [record["loss"] for record in read_records(training.workdir)]


def test_eight_kills(make, one):
    """At the start, between steps, inside a save: bit for bit the undisturbed run."""
    campaign = Campaign(random.Random(os.getpid()))
    for _, different in campaign.kill(make, one[1], 8):
        assert different == []
    assert campaign.kills.total() == 8


def test_two_kills_of_two_processes(make, two):
    campaign = Campaign(random.Random(os.getpid()))
    for _, different in campaign.kill(lambda: make(2), two[1], 2, moments=["step", "save"]):
        assert different == []
    assert campaign.kills.total() == 2


def test_told_to_stop_it_saves_and_says_so(make, one):
    training = make(1, "checkpoint.every=1000")
    (process,) = training.run_until(7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == AGAIN
    assert "SIGTERM: saving, then leaving" in training.output()
    assert "told to stop; saved at step" in training.output()
    training.finish()
    outcome = training.outcome()
    for name in ("state", "metrics", "bad samples"):
        assert outcome[name] == one[1][name], name


def test_a_frozen_process_is_named_by_the_other(make, two):
    training = make(2, "heartbeats.every=0.5", "heartbeats.silence=3.0")
    processes = training.run_until(7)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        assert processes[0].wait(60) == LOST
    finally:
        processes[1].kill()
        processes[1].wait()
    message = (training.workdir / "output-0.txt").read_text()
    assert f"(pid {processes[1].pid})" in message
    assert "has not been heard of since: frozen, killed or cut off" in message
    training.finish()
    assert Campaign(random.Random(0)).compare(training, two[1]) == []


def test_one_process_told_to_stop_stops_all_and_the_launcher_starts_again(make, two):
    """launch/local.sh: only one process gets the signal; both save at the same step, leave, and are started again."""
    training = make(2)
    command = ["bash", "launch/local.sh", "2", *training.command()]
    output = []
    with subprocess.Popen(command, cwd=ROOT, env=training.variables(), stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            output.append(line)
            if "step  5/24" in line:
                os.kill(_children(launcher.pid)[1], signal.SIGTERM)
    assert launcher.returncode == 0, output
    assert "status 75: starting again\n" in output
    assert Campaign(random.Random(0)).compare(training, two[1]) == []


def test_other_numbers_of_devices_and_processes(make, one):
    """1, 2, 4, 8, 3 devices, then two processes: the same samples in the same order, the same losses."""
    training = make()
    for life, devices in enumerate((1, 2, 4, 8, 3)):
        (process,) = training.run_until(4 * (life + 1), 1, devices)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == AGAIN
    training.finish(2)
    assert [r["order"] for r in read_records(training.workdir)] == [r["order"] for r in read_records(one[0].workdir)]
    np.testing.assert_allclose(losses(training), losses(one[0]), rtol=1e-6)


def _children(pid: int) -> list[int]:
    """The training processes below a launcher."""
    found = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in found.stdout.splitlines()]
    return [int(child) for child, parent, arguments in rows if int(parent) == pid and "ssljax.cli" in arguments]
