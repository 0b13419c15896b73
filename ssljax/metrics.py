"""Where numbers go: JSON lines always, TensorBoard events, W&B if asked, and a progress bar or lines for people."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import jax
import psutil
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ssljax.bounded import parse_json, read_lines
from ssljax.goodput import Clock

# Dense bf16 peak of one device, FLOP/s, by `device_kind`. (Vendors' data sheets, without sparsity.)
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: Any) -> float | None:
    """Peak bf16 FLOP/s of a device, or None where it is not known (CPUs)."""
    return PEAK_FLOPS.get(device.device_kind)


class MetricLog:
    """Writes metrics of one run. Only process 0 writes; the others keep silent.

    A context manager: leaving it closes the files and the progress bar. A run that continues at step `start` keeps the
    first `records` lines of its `metrics.jsonl`, as many as there were when that step was saved.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        steps: int,
        start: int,
        records: int = 0,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.console = Console()
        self._main = jax.process_index() == 0
        self._steps, self._started, self._start = steps, time.perf_counter(), start
        self._writers: list[Any] = []
        self._bar: Progress | None = None
        self.records = records
        if not self._main:
            return
        folder = self._folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self._jsonl = _continue_records(folder / "metrics.jsonl", records)
        self._writers = [_TensorBoard(folder / "tensorboard")]
        if wandb is not None:
            self._writers.append(_WandB(wandb, folder, dict(config or {})))
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]train"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, text="compiling")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if self._main:
            self._jsonl.close()
        for writer in self._writers:
            writer.close()

    def say(self, text: Any) -> None:
        """A line (or any rich renderable) for people, above the progress bar."""
        if self._main:
            # Log files are not wrapped.
            self.console.print(text, highlight=False, soft_wrap=not self.console.is_terminal)

    def advance(self, step: int) -> None:
        """Moves the progress bar; costs nothing elsewhere."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record: to `metrics.jsonl` and the other writers. NaN and infinity are written as null."""
        if not self._main:
            return
        values = {k: float(v) for k, v in values.items()}
        record = {
            "step": step,
            "time": round(time.time(), 3),
            **{k: v if math.isfinite(v) else None for k, v in values.items()},
        }
        self._jsonl.write(json.dumps(record) + "\n")
        self._jsonl.flush()
        self.records += 1
        for writer in self._writers:
            writer.write(step, values)

    def rewind(self, records: int) -> None:
        """Drops all records but the first so many: the run goes back to where it was then."""
        self.records = records
        if self._main:
            self._jsonl.close()
            self._jsonl = _continue_records(self._folder / "metrics.jsonl", records)

    def incident(self, step: int, kind: str, text: str) -> None:
        """Something happened to the run: said, and appended to `incidents.jsonl`, which nothing ever shortens."""
        self.say(text)
        if self._main:
            record = {"step": step, "time": round(time.time(), 3), "kind": kind, "text": text}
            with (self._folder / "incidents.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """The record of a log step, also shown: in the bar on a terminal, as a line elsewhere."""
        self.write(step, values)
        text = f"loss {values['loss']:.4f}  {values['images_per_second']:,.0f} images/s"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        else:
            elapsed = time.perf_counter() - self._started
            left = elapsed / max(step - self._start, 1) * (self._steps - step)
            self.say(
                f"step {step:>{len(str(self._steps))}}/{self._steps}  {text}  "
                f"elapsed {_clock(elapsed)}  left {_clock(left)}"
            )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Meter:
    """Throughput between log steps: images/s, share of time spent waiting for data, model FLOP/s and MFU.

    And the goodput of the whole session.
    """

    def __init__(self, step_fn: Any, batch_size: int, mesh: jax.sharding.Mesh, clock: Clock):
        self._clock = clock
        # XLA counts the program of one device.
        self._flops = float((step_fn.cost_analysis() or {}).get("flops", 0.0))
        self._batch, self._devices, self._peak = batch_size, mesh.size, peak_flops(mesh.devices.flat[0])
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew: what came before (compilation, evaluation) is not training."""
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The figures since the last reading."""
        elapsed = time.perf_counter() - self._since
        per_second = self._steps / elapsed
        figures = {
            "images_per_second": per_second * self._batch,
            "images_per_second_per_device": per_second * self._batch / self._devices,
            "data_wait": self._waited / elapsed,
            "flops_per_second_per_device": per_second * self._flops,
            "goodput": self._clock.goodput(),
            "host_memory": _host_memory() / 2**30,  # GiB
        }
        if self._peak:
            figures["mfu"] = per_second * self._flops / self._peak
        self.restart()
        return figures


def _host_memory() -> int:
    """Bytes of main memory that this process and its workers occupy."""
    me = psutil.Process()
    total = me.memory_info().rss
    for worker in me.children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            total += worker.memory_info().rss
    return total


def read_records(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`, oldest first: `step` (int), and numbers, None where not finite, by name.

    A last line cut short by a crash is left out.

    Raises:
      FileNotFoundError: there is no such file. ValueError: a line, which it names, is not such a record.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; is {workdir} the workdir of a run?")
    records: list[dict[str, Any]] = []
    number, line = 0, ""
    try:
        with path.open("r") as file:
            for line in read_lines(file):
                number += 1
                records.append(_record(line))
                line = ""
    except ValueError as error:
        if not line or line.endswith(("\n", "}")):  # else the crash came while it was written
            raise ValueError(f"{path}, line {max(number, 1)}: {error}") from error
    return records


def _record(line: str) -> dict[str, Any]:
    record = parse_json(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("not a record with a step")
    for name, value in record.items():
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"{name!r} is {type(value).__name__}, not a number")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name!r} does not fit into 64 bits")
    return record


def _continue_records(path: epath.Path, records: int) -> Any:
    """Opens the records for appending, all but the first so many dropped. The file is never half written."""
    if path.exists():
        kept = path.read_text().splitlines(keepends=True)[:records]
        temporary = path.with_name(path.name + ".new")
        temporary.write_text("".join(kept))
        temporary.replace(path)
    return path.open("a")


class _TensorBoard:
    """TensorBoard's own event writer, which needs no TensorFlow."""

    def __init__(self, folder: epath.Path):
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._summary(value=[self._summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, project: str, folder: epath.Path, config: dict):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("--wandb needs the package wandb: pip install 'ssljax[wandb]'") from error
        self._run = wandb.init(project=project, dir=str(folder), name=folder.name, config=config, resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
