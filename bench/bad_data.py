"""What bad data and a late start cost the input stream: `python -m bench.bad_data`.

1. Images a second of the training stream (read from a tar, decoded, two random crops) with 1 % of the JPEGs cut in
   half, over the same without: in turn, each time one epoch from a fresh start, so that every bad record is listed.
2. Time to the first batch of a stream that starts at step 1,000,000, over one that starts at step 10, in turn.

Pictures: Caltech-101 of `SSLJAX_DATA`, or else scikit-learn's digits, enlarged. Goals: at least 0.95, at most 2.
"""

import argparse
import io
import logging
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from ssljax.data import Digits, HostTransform, Loader, Tar, train_batches, typical_sample
from ssljax.views import View

BATCH = 64


def jpegs(count: int) -> list[bytes]:
    if "SSLJAX_DATA" in os.environ:
        source = Tar("$SSLJAX_DATA/caltech101/train.tar")
        return [source[i % len(source)]["image"] for i in range(count)]
    source = Digits(size=256)
    return [cv2.imencode(".jpg", source[i % len(source)]["image"])[1].tobytes() for i in range(count)]


def write(path: Path, pictures: Sequence[bytes]) -> Tar:
    with tarfile.open(path, "w") as tar:
        for i, picture in enumerate(pictures):
            member = tarfile.TarInfo(f"{i:06d}.jpg")
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))
    return Tar(str(path))


class Stream:
    """A training stream, to be started again and again."""

    def __init__(self, source: Tar, size: int, threads: int):
        self.source, self.loader = source, Loader(threads=threads)
        self.transform = HostTransform(crops={"x1": View(size), "x2": View(size)})
        self.like = typical_sample(source, self.transform)

    def epoch(self, bad_log: Path) -> tuple[float, float, int]:
        """Seconds on the clock, seconds of CPU, bad records met."""
        bad_log.unlink(missing_ok=True)
        clock, cpu = time.perf_counter(), time.process_time()
        batches = train_batches(
            self.source,
            self.transform,
            batch_size=BATCH,
            seed=0,
            steps=len(self.source) // BATCH,
            loader=self.loader,
            like=self.like,
            bad_log=bad_log,
        )
        bad = sum(int(batch["replaced"].sum()) for batch in batches)
        return time.perf_counter() - clock, time.process_time() - cpu, bad

    def first_batch(self, step: int) -> float:
        """Seconds."""
        began = time.perf_counter()
        serial = Loader(threads=0)
        options = {"batch_size": BATCH, "seed": 0, "loader": serial, "like": self.like}
        batches = train_batches(self.source, self.transform, start=step * BATCH, **options)
        next(batches)
        elapsed = time.perf_counter() - began
        batches.close()
        return elapsed


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--pictures", type=int, default=1_500)
    parser.add_argument("--size", type=int, default=128, help="side of the crops")
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        logging.basicConfig(filename=root / "log", force=True)
        pictures = jpegs(options.pictures)
        broken = [data[: len(data) // 2] if i % 100 == 50 else data for i, data in enumerate(pictures)]
        clean, bad = (
            Stream(write(root / f"{name}.tar", data), options.size, options.threads)
            for name, data in (("clean", pictures), ("broken", broken))
        )
        ratios: dict[str, list[float]] = {"clock": [], "CPU": []}
        speed, found = [], 0
        for repeat in range(options.repeats + 1):
            streams = (clean, bad) if repeat % 2 else (bad, clean)
            times = {stream: stream.epoch(root / "bad.jsonl") for stream in streams}
            if repeat:  # the first warms up
                for which, name in enumerate(ratios):
                    ratios[name].append(times[clean][which] / times[bad][which])
                speed.append(options.pictures // BATCH * BATCH / times[clean][0])
                found = times[bad][2]
        title = f"{options.pictures} JPEGs, {options.threads} threads, {os.cpu_count()} cores: median (least to most)"
        table = Table("", "", title=title, title_justify="left")
        table.add_row("images/s, clean", f"{statistics.median(speed):,.0f} ({min(speed):,.0f} to {max(speed):,.0f})")
        table.add_row("bad records met in an epoch", str(found))
        for name, values in ratios.items():
            table.add_row(f"throughput with 1 % broken over clean, by {name} time", spread(values))
        console.print(table)
        seeks: dict[int, list[float]] = {10: [], 1_000_000: []}
        for i in range(5 * options.repeats):
            for step in reversed(seeks) if i % 2 else seeks:
                seeks[step].append(clean.first_batch(step + i))
        late, early = (np.median(seeks[step]) for step in (1_000_000, 10))
        table = Table("start at step", "ms to the first batch", title=f"Seek, batches of {BATCH}", title_justify="left")
        for step, values in seeks.items():
            table.add_row(f"{step:,}", spread([1e3 * value for value in values]))
        table.add_row("ratio of medians", f"{late / early:.3f}")
        console.print(table)


if __name__ == "__main__":
    main()
