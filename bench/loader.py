"""Does a second core double the loader? Images per second of one thread, of several threads and of as many processes,
in turn, and the memory.

    python -m bench.loader --tar $SSLJAX_DATA/caltech101/train.tar

Beside it the same question for OpenCV alone, which needs nothing of Python: what this machine can give at the time.
Memory is what the process of the threads grows by while the loader is full and nobody takes a batch, beside what
`Loader.held` says.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Iterator

import cv2
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from ssljax.data import HostTransform, Loader, Source, Tar, train_batches, typical_sample
from ssljax.data.stream import Transform
from ssljax.views import View, multi_crop, simclr

BATCH, WARM_UP = 32, 12


def loader_rate(source: Source, transform: Transform, like: dict, loader: Loader, seconds: float) -> float:
    """Images/s."""
    batches = train_batches(source, transform, batch_size=BATCH, seed=0, like=like, loader=loader)
    for _ in range(WARM_UP):
        next(batches)
    began, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        next(batches)
        count += BATCH
    batches.close()
    return count / elapsed


def opencv_rate(threads: int, seconds: float) -> float:
    """Blurs/s."""
    counts, end = [0] * threads, time.perf_counter() + seconds

    def work(number: int) -> None:
        image, taps = np.zeros((224, 224, 3), np.float32), np.ones(9) / 9
        while time.perf_counter() < end:
            cv2.sepFilter2D(image, -1, taps, taps, dst=image)
            counts[number] += 1

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / seconds


def memory(source: Source, transform: Transform, like: dict, loader: Loader) -> tuple[float, float]:
    """MiB that a full loader occupies, and that it says it occupies at most."""
    process = psutil.Process()
    before = process.memory_info().rss
    batches = train_batches(source, transform, batch_size=BATCH, seed=0, like=like, loader=loader)
    batches.start()
    most, end = before, time.perf_counter() + 8
    while time.perf_counter() < end:
        most = max(most, process.memory_info().rss)
        time.sleep(0.01)
    size = BATCH * sum(x.nbytes for x in like.values())
    batches.close()
    return (most - before) / 2**20, loader.held * size / 2**20


def transforms() -> Iterator[tuple[str, HostTransform]]:
    for recipe, fields in (("SimCLR", simclr(224)), ("DINO 2+8", multi_crop())):
        views = {name: View(**view) for name, view in fields.items()}
        for way in ("crop", "augment"):
            yield f"{recipe}, host={way!r}", HostTransform(crops=views, augment=way == "augment")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tar", required=True, help="shards with JPEGs")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    source, n = Tar(options.tar), options.cores
    loaders = {
        "1 thread": Loader(threads=1),
        f"{n} threads": Loader(threads=n),
        f"{n} processes": Loader(workers=n, prefetch=4),
    }
    table = Table("", *loaders, *(f"efficiency, {name}" for name in [*loaders][1:]), "OpenCV's", "MiB", "of at most")
    for name, transform in transforms():
        like = typical_sample(source, transform)
        held, most = memory(source, transform, like, loaders[f"{n} threads"])
        rates, opencvs = [], []
        for _ in range(options.rounds):
            rates.append([loader_rate(source, transform, like, loader, options.seconds) for loader in loaders.values()])
            one, many = (opencv_rate(threads, options.seconds / 3) for threads in (1, n))
            opencvs.append(many / one / n)
        one, *others = zip(*rates, strict=True)
        shares = [[b / a / n for a, b in zip(one, many, strict=True)] for many in others]
        spreads = (f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in shares)
        medians = (f"{statistics.median(each):,.0f}" for each in (one, *others))
        table.add_row(name, *medians, *spreads, f"{statistics.median(opencvs):.2f}", f"{held:,.0f}", f"{most:,.0f}")
    for column in table.columns[1:]:
        column.justify = "right"
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
