"""SimCLR on CIFAR-10, ssljax against lightly, on the same CPU cores. Run by hand, on an otherwise idle machine:

    python -m bench.peers.simclr_cifar10 --theirs-python PEERS/bin/python --data $SSLJAX_DATA --steps 1500 --seeds 3

PEERS is an environment with `lightly` and `torchvision`. Network, first weights, batch size, steps, learning rates,
weight decay, temperature and augmentations are the same; lightly contributes transform, head and loss. The two run in
turn, each in a process of its own, on images decoded once; ssljax's k-NN and linear probe score the features of both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np

from ssljax.data import Npz
from ssljax.data.pictures import decode
from ssljax.evals.knn import knn
from ssljax.evals.linear import linear_probe

# Large pages for large arrays: without them both sides spend up to a quarter of a step on page faults.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
Results = dict[str, list[dict]]


def run(python: str, module: str, *arguments: object) -> None:
    command = [python, "-W", "ignore", "-m", f"bench.peers.{module}", *map(str, arguments)]
    began = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | ENVIRONMENT)
    print(f"  {module}: {time.perf_counter() - began:.0f} s", flush=True)


def decode_once(source: Path, folder: Path, bank: int, test: int) -> dict[str, np.ndarray]:
    """Writes train.npy, bank.npy (its first images: balanced over classes) and test.npy; returns the labels."""
    labels = {}
    for name, limit in (("train", None), ("test", test)):
        records = Npz(str(source / "cifar10" / f"{name}.npz"), limit=limit)
        rows = [records[i] for i in range(len(records))]
        images = np.stack([decode(row["image"]) for row in rows])
        labels[name] = np.array([row["label"] for row in rows])
        np.save(folder / f"{name}.npy", images)
        if name == "train":
            np.save(folder / "bank.npy", images[:bank])
            labels["bank"] = labels["train"][:bank]
    return labels


def score(features: Path, labels: dict[str, np.ndarray]) -> dict[str, float]:
    x = np.load(features)
    data = x["bank"], labels["bank"], x["test"], labels["test"]
    return {**knn(*data, classes=10, k=(20,), temperature=0.07), **linear_probe(*data, classes=10)}


def table(results: Results, batch_size: int, steps: int) -> str:
    def row(name: str, of: Callable[[dict], float], form: str, spread: Callable[[list[float], str], str]) -> str:
        values = {side: [of(r) for r in runs] for side, runs in results.items()}
        ratio = median(values["ours"]) / median(values["theirs"])
        cells = "".join(f"{spread(v, form):>26}" for v in values.values())
        return f"{name:32}{cells}{ratio:10.2f}"

    def span(values: list[float], form: str) -> str:
        return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"

    def sd(values: list[float], form: str) -> str:
        return f"{mean(values):{form}} ± {stdev(values) if len(values) > 1 else 0:{form}}"

    lines = [
        f"{'':32}{'ssljax':>26}{'lightly':>26}{'ratio':>10}",
        row("training, wall s", lambda r: r["train"]["wall"], ".1f", span),
        row("training, CPU s", lambda r: r["train"]["cpu"], ".1f", span),
        row("compilation and first step, s", lambda r: r["first"], ".1f", span),
        row("images/s", lambda r: batch_size * (steps - 1) / r["train"]["wall"], ".0f", span),
        row("one step, ms", lambda r: 1e3 * r["train"]["wall"] / (steps - 1), ".0f", span),
        row("  network alone, ms", lambda r: 1e3 * r["step"]["wall"], ".0f", span),
        row("  network alone, CPU ms", lambda r: 1e3 * r["step"]["cpu"], ".0f", span),
        row("peak memory, GB", lambda r: r["memory"], ".2f", span),
        row("loss, last 20 steps", lambda r: r["loss"], ".3f", sd),
        row("k-NN top-1 %", lambda r: 100 * r["trained"]["knn20_top1"], ".1f", sd),
        row("  same weights, untrained", lambda r: 100 * r["random"]["knn20_top1"], ".1f", sd),
        row("linear top-1 %", lambda r: 100 * r["trained"]["linear_top1"], ".1f", sd),
        row("  same weights, untrained", lambda r: 100 * r["random"]["linear_top1"], ".1f", sd),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs-python", required=True, help="interpreter with lightly and torchvision")
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10/train.npz and test.npz")
    parser.add_argument("--network", choices=("resnet", "vit"), default="resnet")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bank", type=int, default=50_000, help="training images that the evaluation learns from")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--synthetic", type=int, default=8, help="repeats of the network's step, and of each setting")
    parser.add_argument("--settings", help="of PyTorch, as JSON, instead of trying them all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        began = time.perf_counter()
        labels = decode_once(args.data, work, args.bank, args.test)
        print(f"decoded once, for both, in {time.perf_counter() - began:.1f} s", flush=True)
        settings, results = args.settings, {"ours": [], "theirs": []}
        for seed in range(args.seeds):
            ours, theirs = work / f"ours{seed}", work / f"theirs{seed}"
            common = ("--data", work, "--seed", seed, "--synthetic", args.synthetic)
            print(f"seed {seed}", flush=True)
            run(sys.executable, "ours", *common, "--out", ours, "--network", args.network, "--steps", args.steps)
            if settings is None:
                run(args.theirs_python, "theirs", *common, "--out", theirs, "--source", ours, "--tune")
                tuned = json.loads((theirs / "tuned.json").read_text())
                settings = json.dumps(tuned["settings"])
                print("".join(f"    {s:.3f} s  {trial}\n" for trial, s in tuned["trials"].items()), end="")
            run(args.theirs_python, "theirs", *common, "--out", theirs, "--source", ours, "--settings", settings)
            random = score(ours / "random.npz", labels)
            for side, out in (("ours", ours), ("theirs", theirs)):
                result = json.loads((out / "result.json").read_text())
                results[side].append({**result, "random": random, "trained": score(out / "trained.npz", labels)})
        batch_size = json.loads((ours / "recipe.json").read_text())["batch_size"]
    print(f"\n{args.network}, {args.steps} steps of {batch_size} images, {args.seeds} seed(s), {os.cpu_count()} cores")
    print(f"median (min-max) or mean ± sd; lightly with {settings}")
    print(table(results, batch_size, args.steps))


if __name__ == "__main__":
    main()
