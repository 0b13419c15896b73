"""Kills real training processes at random moments and holds what comes out to the run that nobody disturbed.

    python -m bench.chaos --kills 200

Runs are started as a user starts them, on tar shards with a broken picture in them, by one process and by two. SIGKILL
comes while a run starts, while it steps, or while it writes a checkpoint; the same command is started again until the
run is done. Then parameters, optimiser, method state (teacher, queue, centre), order of the samples, metrics and counts
must be those of the undisturbed run, bit for bit.
"""

import io
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np

from ssljax.checkpoint import CheckpointStore
from ssljax.config import experiment, load_config
from ssljax.data import Digits
from ssljax.mesh import abstract_like
from ssljax.metrics import read_records
from ssljax.run import Run

ROOT = Path(__file__).parent.parent.parent
CONFIG = Path(__file__).parent / "config.py"
MOMENTS = ("start", "step", "save")
CLOCK = ("time", "per_second", "data_wait", "goodput", "host_memory")  # metrics of the machine, not of the run
PATIENCE = 300.0  # seconds that a process may take for anything


def write_shards(folder: Path, pictures: int = 320, shards: int = 2) -> str:
    """Digits as JPEG files in tar shards, one of them cut short; the source's name for configs."""
    source = Digits("train", 8)
    for shard in range(shards):
        with tarfile.open(folder / f"digits-{shard:03}.tar", "w") as tar:
            for index in range(shard, pictures, shards):
                content = cv2.imencode(".jpg", source[index]["image"])[1].tobytes()
                member = tarfile.TarInfo(f"{index:05}.jpg")
                content = content[: len(content) // 2] if index == 7 else content
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return f"tar:{folder}/digits-{{000..{shards - 1:03}}}.tar"


@dataclass(frozen=True)
class Training:
    """A run: how it is started, in how many processes, and what it leaves behind."""

    workdir: Path
    source: str
    processes: int = 1
    overrides: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self, processes: int | None = None, devices: int = 1) -> list[subprocess.Popen]:
        """The command, once for each process (of so many CPU devices). It starts the run, or resumes it."""
        processes = processes or self.processes
        self.workdir.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        started = []
        for process in range(processes):
            several = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process",
                       str(process)]  # fmt: skip
            with (self.workdir / f"output-{process}.txt").open("a") as output:
                started.append(
                    subprocess.Popen(
                        self.command() + several * (processes > 1),
                        cwd=ROOT,
                        env=self.variables(devices),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        return started

    def command(self) -> list[str]:
        """Of one process."""
        return [sys.executable, "-m", "ssljax.cli", "train", "--config", f"{CONFIG}:run", "--workdir",
                str(self.workdir), "--no-report", f"data.train={self.source}", *self.overrides]  # fmt: skip

    def variables(self, devices: int = 1) -> dict[str, str]:
        """The environment of a process with so many CPU devices."""
        flags = f"--xla_force_host_platform_device_count={devices}"
        return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, **self.environment}

    def finish(self, processes: int | None = None, devices: int = 1) -> None:
        """Runs it to its end."""
        for process in self.start(processes, devices):
            if process.wait(PATIENCE) != 0:
                raise RuntimeError(f"{self.workdir} failed:\n{self.output()}")

    def run_until(self, step: int, processes: int | None = None, devices: int = 1) -> list[subprocess.Popen]:
        """Starts it and returns its processes when the metrics of that step are written."""
        started, began = self.start(processes, devices), time.monotonic()
        while self.steps_logged() < step:
            if time.monotonic() - began > PATIENCE or any(process.poll() is not None for process in started):
                raise RuntimeError(f"{self.workdir} did not get to step {step}:\n{self.output()}")
            time.sleep(0.01)
        return started

    def output(self) -> str:
        """The end of what the processes printed."""
        return "\n".join(file.read_text()[-3000:] for file in sorted(self.workdir.glob("output-*.txt")))

    def outcome(self) -> dict[str, Any]:
        """What two equal runs agree in."""
        config = load_config(f"{CONFIG}:run", [f"data.train={self.source}", *self.overrides])
        run = Run(experiment(config), jax.devices()[:1])
        found = CheckpointStore(self.workdir).restore(abstract_like(run.state_shapes, run.state_shardings))
        records = [
            {name: value for name, value in record.items() if not any(part in name for part in CLOCK)}
            for record in read_records(self.workdir)
        ]
        bad = sorted(set((self.workdir / "bad_samples.jsonl").read_text().splitlines()))
        state = [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(found.state)]
        return {"state": state, "progress": found.progress, "metrics": records, "bad samples": bad}

    def steps_logged(self) -> int:
        log = self.workdir / "metrics.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        folder = self.workdir / "checkpoints"
        return folder.is_dir() and any("tmp" in name for name in os.listdir(folder))


@dataclass
class Campaign:
    """Kills, by moment, and what became of the runs."""

    random: random.Random
    kills: Counter = field(default_factory=Counter)
    equal: int = 0
    runs: int = 0

    def kill(
        self,
        make: Callable[[], Training],
        undisturbed: dict[str, Any],
        kills: int,
        per_run: int = 10,
        moments: Sequence[str] = MOMENTS,
    ) -> Iterator[tuple[Training, list[str]]]:
        """So many kills, of as many runs as that takes; each run when it is done, and in what it differs."""
        until = self.kills.total() + kills
        while (left := until - self.kills.total()) > 0:
            training = make()
            self.disturb(training, min(per_run, left), moments)
            yield training, self.compare(training, undisturbed)

    def disturb(self, training: Training, kills: int, moments: Sequence[str] = MOMENTS) -> None:
        """Kills the run so many times (or until it gets to its end), then lets it finish."""
        for _ in range(kills):
            processes, moment = training.start(), self.random.choice(moments)
            before = training.steps_logged()
            if not self._wait(training, processes, moment, before):
                break
            # All of a machine's processes go at once, or one goes and the other notices.
            first = self.random.randrange(len(processes))
            processes[first].send_signal(signal.SIGKILL)
            if self.random.random() < 0.5:
                time.sleep(self.random.uniform(0, 0.5))
            for process in processes:
                process.kill()
                process.wait(PATIENCE)
            self.kills[moment] += 1
        training.finish()

    def compare(self, training: Training, undisturbed: dict[str, Any]) -> list[str]:
        """In what the run differs from the undisturbed one."""
        outcome = training.outcome()
        different = [name for name in undisturbed if outcome[name] != undisturbed[name]]
        self.runs += 1
        self.equal += not different
        return different

    def _wait(self, training: Training, processes: list[subprocess.Popen], moment: str, before: int) -> bool:
        """Until the moment to kill; False if the run came to its end first."""
        began = time.monotonic()
        until = self.random.uniform(0, 8) if moment == "start" else PATIENCE
        steps = self.random.randint(1, 12)
        while time.monotonic() - began < until:
            if any(process.poll() is not None for process in processes):
                if any(process.wait(PATIENCE) for process in processes):
                    raise RuntimeError(f"{training.workdir} failed:\n{training.output()}")
                return False
            # A resumed run drops the records of the steps it repeats, so the count may fall first.
            before = min(before, training.steps_logged())
            if moment == "start" and training.steps_logged() > before:
                break
            if moment == "save" and training.steps_logged() > before and training.saving():
                break
            if moment == "step" and training.steps_logged() >= before + steps:
                break
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, 0.1))
        return True


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
