"""The command of `bench.chaos`."""

import argparse
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import jax

from bench.chaos import Campaign, Training, write_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--per-run", type=int, default=10, help="kills of one run before it is left in peace")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, Python {platform.python_version()}, seed {options.seed}")
    print("processes  runs equal  kills  at start  between steps  in a save  seconds")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = write_shards(root)
        for processes, share in ((1, 0.7), (2, 0.3)):
            undisturbed = Training(root / f"undisturbed-{processes}", source, processes)
            undisturbed.finish()
            expected = undisturbed.outcome()
            campaign, began = Campaign(random.Random(options.seed + processes)), time.monotonic()
            number, kills = count(), campaign.kills

            def make(processes: int = processes, number: Iterator[int] = number) -> Training:
                return Training(root / f"run-{processes}-{next(number)}", source, processes)

            for training, different in campaign.kill(make, expected, round(share * options.kills), options.per_run):
                said = f"differs in {', '.join(different)}" if different else "equal"
                print(f"{training.workdir.name}: {said}, {kills.total()} kills so far", file=sys.stderr, flush=True)
            print(
                f"{processes:9}  {f'{campaign.equal} of {campaign.runs}':>10}  {kills.total():5}  {kills['start']:8}  "
                f"{kills['step']:13}  {kills['save']:9}  {time.monotonic() - began:7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
