"""Runs of many processes: how this one was launched, joining the others, and coming to one decision with them."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """How this process was started; `coordinator` is None where jax finds it by itself."""

    kind: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __str__(self) -> str:
        if self.kind == "single process":
            return self.kind
        of = f", process {self.process} of {self.processes}" if self.processes is not None else ""
        return f"{self.kind}{of}" + (f", coordinator {self.coordinator}" if self.coordinator else "")


def detect(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Launch:
    """Recognises, in this order: `--coordinator` arguments, SLURM, TPU pods and GKE, a single process.

    Raises:
      ValueError: `--coordinator` without `--processes` and `--process`, or numbers that make no sense.
    """
    if coordinator is not None or processes is not None or process is not None:
        if coordinator is None or processes is None or process is None:
            raise ValueError("--coordinator host:port, --processes N and --process I belong together; give all three")
        if not 0 <= process < processes:
            raise ValueError(f"--process {process} must be between 0 and {processes - 1} (--processes {processes})")
        if ":" not in coordinator:
            raise ValueError(f"--coordinator {coordinator!r} needs a port, for example {coordinator}:12345")
        return Launch("--coordinator", coordinator, processes, process)
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    # Inside `salloc` or `sbatch` without srun there is no SLURM_STEP_NUM_TASKS: one process only.
    if "SLURM_JOB_ID" in environment and "SLURM_STEP_NUM_TASKS" in environment and tasks > 1:
        return Launch(f"SLURM job {environment['SLURM_JOB_ID']}", None, tasks, int(environment["SLURM_PROCID"]))
    workers = [w for w in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if w]
    if len(workers) > 1:
        kind = "GKE TPU slice" if "KUBERNETES_SERVICE_HOST" in environment else "TPU pod slice"
        return Launch(kind, None, len(workers), int(environment.get("TPU_WORKER_ID", "0")))
    if "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return Launch("TPU multislice", None, None, None)
    if "JOB_COMPLETION_INDEX" in environment and "JAX_COORDINATOR_ADDRESS" in environment:
        return Launch(
            "Kubernetes indexed job",
            environment["JAX_COORDINATOR_ADDRESS"],
            int(environment["JAX_NUM_PROCESSES"]),
            int(environment["JOB_COMPLETION_INDEX"]),
        )
    return Launch("single process")


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Launch:
    """Joins the other processes of the run, if there are any. Call it before anything touches a device."""
    launch = detect(os.environ, coordinator, processes, process)
    flags = os.environ.get("XLA_FLAGS", "")
    if launch.kind != "single process" or "xla_force_host_platform_device_count" in flags:
        # Collectives of a program must meet in one order on all CPU devices. A device blocks in each, so where cores
        # are fewer than devices, those that wait in one would keep the others from the next.
        os.environ["XLA_FLAGS"] = f"--xla_cpu_enable_concurrency_optimized_scheduler=false {flags}"
    if launch.kind == "single process":
        return launch
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # Programs that do not depend on each other may otherwise run side by side, in another order on each process, so
        # that messages of different programs meet. (Accelerators run programs in order.)
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if launch.coordinator is None:
        jax.distributed.initialize()  # finds the others by itself
    else:
        jax.distributed.initialize(launch.coordinator, launch.processes, launch.process)
    return launch


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, in their order. All of them must call it."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def check_alike(facts: Mapping[str, str]) -> None:
    """Raises ValueError, on all processes, unless all of them have the same facts."""
    first, *others = [json.loads(text) for text in gather_texts(json.dumps(dict(facts)))]
    for process, theirs in enumerate(others, start=1):
        for name in {**first, **theirs}:
            if (there := theirs.get(name, "nothing")) != (here := first.get(name, "nothing")):
                raise ValueError(
                    f"{name} is {here} in process 0, but {there} in process {process}: "
                    "start all processes with the same command, code and files"
                )


def agreed(work: Callable[[], T], kinds: Sequence[type[Exception]]) -> T:
    """What `work()` returns; where it raises one of `kinds` on one process, it raises that on all: they go on alike."""
    result: Any = None
    failure, cause = None, None
    try:
        result = work()
    except tuple(kinds) as error:
        failure, cause = [[isinstance(error, kind) for kind in kinds].index(True), str(error)], error
    failures = [json.loads(text) for text in gather_texts(json.dumps(failure))]
    for process, found in enumerate(failures):
        if found:
            kind, text = found
            where = f"process {process}: " if len(failures) > 1 else ""
            raise kinds[kind](where + text) from cause
    return result
