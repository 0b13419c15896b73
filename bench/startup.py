"""From the start of the process to the end of its first step, resuming: `JAX_PLATFORMS=cpu python -m bench.startup`.

SimCLR with a ViT-S/16 on scikit-learn's digits at 64 pixels, batch 16, Adam: 21.7 million parameters, a checkpoint of
260 MB. A first process makes the checkpoint and fills the compilation cache, both in the workdir, and is killed; then
the same command is started again and again, and killed after its first step. Wall-clock seconds by phase, from the
record that each process keeps (`ssljax.goodput`), medians of all starts; and CPU seconds of the whole process, which
depend less on what else the machine does. "ViT-S/16, scanned" is the same with `scan=True`.
"""

import argparse
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ssljax.goodput import PHASES, Record, read_sessions

ROOT = Path(__file__).parent.parent
VARIANTS = {"ViT-S/16": False, "ViT-S/16, scanned": True}


def command(workdir: Path, scan: bool) -> list[str]:
    encoder = {"type": "ViT", "size": "S", "patch": 16, "image_size": 64, "scan": scan}
    sizes = [f"{name}.size=64" for name in ("data", *(f"data.views.views.{x}" for x in ("x1", "x2")))]
    return [
        *(sys.executable, "-m", "ssljax.cli", "train"),
        *("--config", f"{ROOT}/configs/simclr.py:digits", "--workdir", str(workdir), "--no-report"),
        *sizes,
        "data.eval_view.views.image.size=64",
        "data.train={'type': 'Digits', 'size': 64}",
        f"method.encoder={encoder}",
        "batch_size=16",
        "evals={}",
        "steps=1000",
        "checkpoint.every=2",
    ]


def run_until(enough: Callable[[Record], bool], workdir: Path, scan: bool) -> tuple[Record, float]:
    """Starts the command and kills it as soon as its record says enough. (That record, CPU seconds.)"""
    before, cpu = len(read_sessions(workdir)), _cpu_of_children()
    process = subprocess.Popen(command(workdir, scan), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        while process.poll() is None:
            records = read_sessions(workdir)
            if len(records) > before and enough(records[-1]):
                break
            time.sleep(0.05)
        else:
            raise RuntimeError(process.communicate()[0].decode())
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return records[-1], _cpu_of_children() - cpu


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _saved(workdir: Path) -> Callable[[Record], bool]:
    return lambda _: any(path.name.isdecimal() for path in workdir.glob("checkpoints/*"))


def measure(workdir: Path, scan: bool, repeats: int, console: Console) -> list[tuple[Record, float]]:
    cold, _ = run_until(_saved(workdir), workdir, scan)
    console.print(f"without a cache and a checkpoint, the first step is done after {cold.first_step_after:.1f} s")
    # One more, so that the programs of the resumed run are in the cache as well.
    return [run_until(lambda record: record.first_step_after is not None, workdir, scan) for _ in range(repeats + 1)][
        1:
    ]


def table(title: str, found: list[tuple[Record, float]]) -> Table:
    rows = {
        name: [record.seconds[name] for record, _ in found] for name in ("start", "compile", "restore", "data wait")
    }
    rest = {name for name in PHASES if name not in rows}
    assert not any(record.seconds[name] for record, _ in found for name in rest)
    rows["first step"] = [record.seconds["step"] for record, _ in found]
    rows["first step done after"] = [record.first_step_after or 0.0 for record, _ in found]
    rows["CPU seconds"] = [cpu for _, cpu in found]
    result = Table("", "median s", "min", "max", title=title, title_justify="left")
    for name, values in rows.items():
        result.add_row(name, *(f"{x:.2f}" for x in (statistics.median(values), min(values), max(values))))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    console = Console(width=120, highlight=False)
    imports = []
    for _ in range(options.repeats + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import ssljax.train"], check=True, cwd=ROOT)
        imports.append(time.perf_counter() - began)
    console.print(f"{os.cpu_count()} cores; imports alone (in `start`): median {statistics.median(imports[1:]):.2f} s")
    for name, scan in VARIANTS.items():
        with tempfile.TemporaryDirectory() as workdir:
            found = measure(Path(workdir), scan, options.repeats, console)
        console.print(table(f"{name}: {len(found)} starts with a warm cache", found))


if __name__ == "__main__":
    main()
