"""A frozen, killed or failed process is named by the others, soon; a slow one is reported and waited for."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssljax.watchdog import LOST, Heartbeats, Watchdog

TIMES = Heartbeats(every=0.1, silence=0.6, patience=60.0)
# Process 1 of 2: enters a phase, and then does what the test wants of it.
PEER = """
import sys, time
from ssljax.watchdog import Heartbeats, Watchdog
with Watchdog(sys.argv[1], 1, 2, print, Heartbeats(every=0.1, silence=0.6, patience=60.0)) as watch:
    watch.at("data wait", 7)
    time.sleep(0.5)  # it is in the heartbeat by now
    print("ready", flush=True)
    if sys.argv[2] == "fail":
        raise ValueError("the disk is on fire")
    time.sleep({"finish": 0, "work": 60}[sys.argv[2]])
"""


class Left:
    """Stands where `os._exit` would be: remembers the status, and when."""

    def __init__(self):
        self.status: int | None = None
        self.after = 0.0
        self._began = time.monotonic()

    def __call__(self, status: int) -> None:
        if self.status is None:
            self.status, self.after = status, time.monotonic() - self._began


@pytest.fixture
def peer(tmp_path):
    processes = []

    def start(task: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", PEER, str(tmp_path), task],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def watched(tmp_path, seconds: float, times: Heartbeats = TIMES) -> tuple[Left, list[str]]:
    """Process 0 hangs in a step for so long (or until it leaves)."""
    said: list[str] = []
    with Watchdog(tmp_path, 0, 2, said.append, times, left := Left()) as watch:
        watch.at("step", 7)
        until = time.monotonic() + seconds
        while time.monotonic() < until and left.status is None:
            time.sleep(0.02)
    return left, said


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_silent_process_is_named(tmp_path, peer, how, capsys):
    process = peer("work")
    process.send_signal(how)
    left, said = watched(tmp_path, 20)
    assert left.status == LOST
    assert left.after < 6  # two heartbeats, the silence, and two heartbeats more for process 0; much of it slack
    message = capsys.readouterr().err
    assert f"process 1 on {json.loads((tmp_path / 'heartbeats/1.json').read_text())['host']}" in message
    assert f"(pid {process.pid}): data wait, step 7" in message
    assert "has not been heard of since: frozen, killed or cut off" in message
    assert said


def test_a_failed_process_is_named_with_its_error(tmp_path, peer):
    peer("fail").wait()
    left, said = watched(tmp_path, 20)
    assert left.status == LOST
    assert "ended: ValueError: the disk is on fire" in said[-1]


def test_a_finished_process_is_not_missed(tmp_path, peer):
    peer("finish").wait()
    assert watched(tmp_path, 2)[0].status is None


def test_a_slow_process_is_reported_and_waited_for(tmp_path, peer):
    """Steps that took 0.1 s before: three of them and the silence later, it says who is where."""
    peer("work")
    said: list[str] = []
    with Watchdog(tmp_path, 0, 2, said.append, TIMES, left := Left()) as watch:
        for step in range(3):
            watch.at("step", step)
            time.sleep(0.1)
        time.sleep(2.0)
    assert left.status is None
    assert "no progress for 1 s" in said[0]
    assert "process 0: step, step 2" in said[0]
    assert "): data wait, step 7" in said[0]
    assert "test_watchdog.py" in said[0]  # where the main thread stands
    assert len(said) <= 3  # at most with every doubling


def test_patience_ends(tmp_path, peer):
    peer("work")
    left, said = watched(tmp_path, 20, Heartbeats(every=0.1, silence=0.6, patience=1.5))
    assert left.status == LOST
    assert "no progress for 2 s, the longest that is waited" in said[-1] or "for 1 s" in said[-1]


def test_progress_is_no_reason_to_look(tmp_path):
    """The other process never comes to life: nobody minds as long as steps are taken."""
    said: list[str] = []
    with Watchdog(tmp_path, 0, 2, said.append, TIMES, left := Left()) as watch:
        for step in range(20):
            watch.at("step", step)
            time.sleep(0.1)
    assert left.status is None
    assert said == []


def test_a_heartbeat_says_where_the_process_is(tmp_path):
    with Watchdog(tmp_path, 0, 1, print, TIMES, Left()) as watch:
        watch.at("eval", 3)
        time.sleep(0.3)
        beat = json.loads((tmp_path / "heartbeats/0.json").read_text())
    assert (beat["process"], beat["phase"], beat["step"]) == (0, "eval", 3)
    assert json.loads((tmp_path / "heartbeats/0.json").read_text())["ended"] == "finished"


def test_a_folder_that_cannot_be_written_is_reported_not_fatal(tmp_path):
    said: list[str] = []
    with Watchdog(tmp_path, 0, 1, said.append, TIMES, left := Left()):
        (tmp_path / "heartbeats/0.json").unlink()
        (tmp_path / "heartbeats").rename(tmp_path / "gone")
        time.sleep(0.5)
    assert "cannot be written or read" in said[0]
    assert left.status is None


@pytest.mark.parametrize("wrong", [{"every": 0}, {"silence": 1.0, "every": 2.0}, {"patience": 5.0}])
def test_times_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="0 < every < silence <= patience"):
        Heartbeats(**wrong)
