"""Mutated files through every reader: `JAX_PLATFORMS=cpu python -m bench.fuzz --cases 100000 --seed 0`.

A case is a sound or hostile file (tests/hostile.py) with bits flipped, numbers replaced by extreme ones, pieces cut,
doubled, exchanged or taken from another file; half of the time checksums are then made right again, so that the change
gets past them. It is a function of (seed, reader, number), and each is read in a child process with limited memory. A
reader must return or raise what its documentation says, within a second and 200 MiB: whatever does not is counted, its
files are kept (--keep), and the exit status is 1. `--reader R --number N` repeats one case and shows the error.
"""

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hostile import READERS, Outcome, attempt, limit_memory  # noqa: E402

from bench.mutants import Files, case, seeds  # noqa: E402

MOST_SECONDS, MOST_MIB = 1.0, 200.0
PATIENCE = 20  # seconds without an answer after which a reader hangs

# Share of the cases of each reader: those that read bytes from outside most.
WEIGHTS = {
    "picture": 30,
    "tar": 18,
    "npz": 18,
    "captions": 12,
    "parquet": 12,
    "tokenizer.json": 2,
    "clip": 2,
    "sentencepiece": 2,
    "arrayrecord": 2,
    "records": 2,
    "checkpoint": 5,
}


def place(files: Files, folder: Path) -> Path:
    """Writes the files into an empty folder; returns the one to read."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        os.utime(folder / name, (0, 0))
    return folder / next(iter(files))


def work(seed: int, reader: str, numbers: range, folder: Path) -> None:
    """Reads the cases of `numbers`; a line of JSON for each."""
    seeds(reader)
    limit_memory(2048)
    for number in numbers:
        outcome = attempt(READERS[reader], place(case(seed, reader, number), folder / "case"))
        found = verdict(outcome)
        print(
            json.dumps([number, found, outcome.seconds, outcome.mib, outcome.error, outcome.message[:200]]), flush=True
        )


def verdict(outcome: Outcome) -> str:
    if outcome.error and not outcome.refused:
        return "other errors"
    if outcome.seconds > MOST_SECONDS:
        return "slow"
    if outcome.mib > MOST_MIB:
        return "large"
    return "refused" if outcome.error else "accepted"


GOOD, BAD = ("accepted", "refused"), ("other errors", "crashes", "hangs", "slow", "large")


@dataclass
class Tally:
    """What became of the cases of one reader."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    peak: float = 0.0
    findings: list[tuple[int, str, str]] = field(default_factory=list)  # number, verdict, error

    def add(self, number: int, found: str, seconds: float, mib: float, error: str) -> None:
        self.counts[found] += 1
        self.slowest, self.peak = max(self.slowest, seconds), max(self.peak, mib)
        if found in BAD:
            self.findings.append((number, found, error))


def watch(seed: int, reader: str, count: int, folder: Path) -> Tally:
    """Has the cases read, by a new process after each that dies or hangs."""
    tally, number = Tally(), 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "RUST_BACKTRACE": "0"}
    while number < count:
        command = [sys.executable, "-W", "ignore", "-m", "bench.fuzz", "--work", str(folder), "--reader", reader]
        command += ["--seed", str(seed), "--number", str(number), "--cases", str(count)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT, bufsize=0
        )
        assert process.stdout is not None
        pending, patience = b"", 120  # to start with, the imports and the seeds
        while number < count:
            if not select.select([process.stdout], [], [], patience)[0]:
                process.kill()
                tally.add(number, "hangs", float(patience), 0.0, "")
                break
            block = os.read(process.stdout.fileno(), 2**16)
            if not block:
                tally.add(number, "crashes", 0.0, 0.0, f"exit status {process.wait()}")
                break
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                number, found, seconds, mib, error, message = json.loads(line)
                tally.add(number, found, seconds, mib, f"{error}: {message}")
                number += 1
            patience = PATIENCE
        number += number < count
        process.kill()
        process.wait()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=sorted(WEIGHTS), help="only this one")
    parser.add_argument("--number", type=int, help="with --reader: repeat this case here")
    parser.add_argument("--keep", type=Path, help="folder for the files that a reader failed on")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.seed, options.reader, range(options.number, options.cases), options.work)
        return 0
    if options.number is not None:
        return repeat(options.seed, options.reader, options.number)
    weights = {options.reader: 1} if options.reader else WEIGHTS
    tallies: dict[str, Tally] = {}
    started = time.perf_counter()
    for reader, weight in weights.items():
        with tempfile.TemporaryDirectory(prefix="ssljax-fuzz-") as folder:
            count = max(1, round(options.cases * weight / sum(weights.values())))
            tallies[reader] = watch(options.seed, reader, count, Path(folder))
    print(report(tallies))
    print(f"\nseed {options.seed}, {sum(t.counts.total() for t in tallies.values()):,} cases, "
          f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    for reader, tally in tallies.items():
        for number, found, error in tally.findings:
            print(f"{found}: --reader {reader} --number {number}  {error[:160]}")
            if options.keep:
                place(case(options.seed, reader, number), options.keep / f"{reader}-{number}")
    return int(any(tally.findings for tally in tallies.values()))


def report(tallies: Mapping[str, Tally]) -> str:
    head = ("reader", "cases", *GOOD, *BAD, "slowest, s", "peak, MiB")
    rows = []
    for reader, t in tallies.items():
        counts = (f"{t.counts[kind]:,}" for kind in (*GOOD, *BAD))
        rows.append((reader, f"{t.counts.total():,}", *counts, f"{t.slowest:.2f}", f"{t.peak:.0f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---", *["--:"] * (len(head) - 1)), *rows))


def repeat(seed: int, reader: str, number: int) -> int:
    with tempfile.TemporaryDirectory(prefix="ssljax-fuzz-") as folder:
        path = place(case(seed, reader, number), Path(folder))
        print(*(f"{name}: {len(data):,} bytes" for name, data in case(seed, reader, number).items()), sep="\n")
        try:
            READERS[reader](path)
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
