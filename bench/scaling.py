"""Tables of docs/scaling.md: `python -m bench.scaling`, which writes bench/results/<date>-scaling.md.

Needs no accelerator but the TPU compiler (`pip install 'ssljax[tpu]'`), and a minute or two a row. Every row of the
first two tables is an `ssljax plan --json -`, each in a process of its own. The last table compiles the contrastive
loss alone.
"""

import argparse
import datetime
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ssljax.chips import Topology
from ssljax.flops import matmul_flops
from ssljax.hlo import Program
from ssljax.losses import clip_softmax
from ssljax.mesh import Mesh, batch_sharding

ROOT = Path(__file__).parent.parent
PODS = (
    ("configs/clip.py:paper_b16", "v5e:16x16"),
    ("configs/clip.py:paper_l14", "v5e:16x16"),
    ("configs/clip.py:paper_b16", "v5p:4x4x4"),
    ("configs/clip.py:paper_l14", "v5p:4x4x4"),
    ("configs/clip.py:paper_l14", "v5p:4x4x4", "mesh.replica=1", "mesh.fsdp=64"),
    ("configs/clip.py:paper_b16", "h100:64"),
    ("configs/simclr.py:paper", "v4:4x4x4"),
)
WEAK, ROWS = ("v4:2x2x4", "v4:4x4x4", "v4:4x8x8", "v4:8x8x16"), 128  # rows of the batch on each chip


def plan(config: str, topology: str, *overrides: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "ssljax.cli", "plan", "--config", config, "--topology", topology, "--json", "-"]
    return json.loads(subprocess.run([*command, *overrides], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def span(low: float, high: float, digits: int = 0) -> str:
    return f"{low:,.{digits}f} to {high:,.{digits}f}"


def pods() -> Iterator[str]:
    yield "| config | topology | batch | GiB a chip | step, ms | MFU at most | examples/s | days | first bottleneck |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for config, topology, *overrides in PODS:
        p = plan(config, topology, *overrides)
        head = f"| {' '.join((config, *overrides))} | {topology} | {p['batch_size']:,} | "
        head += f"{p['needs'] / 2**30:.1f} of {p['capacity'] / 2**30:.1f} | "
        if not p["fits"]:
            yield head + "does not fit | | | | |"
            continue
        fast, slow, batch = p["fastest"], p["slowest"], p["batch_size"]
        days = span(p["steps"] * fast / 86_400, p["steps"] * slow / 86_400, 2)
        times = f"{span(1e3 * fast, 1e3 * slow)} | {100 * p['mfu']:.0f} % | {span(batch / slow, batch / fast)} | {days}"
        yield f"{head}{times} | {p['bottleneck']} |"


def weak() -> Iterator[str]:
    """Efficiency: the step on the fewest chips over that on these, without overlap."""
    yield "| topology | chips | batch | sent, MB a chip | network, ms | step, ms | efficiency without overlap |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    first = None
    for name in WEAK:
        chips = math.prod(Topology.parse(name).shape)
        p = plan("configs/clip.py:paper_b16", name, f"batch_size={ROWS * chips}")
        sent = sum(row["sent"] for row in p["collectives"]) / 1e6
        first = first or p["slowest"]
        row = f"| {name} | {chips:,} | {p['batch_size']:,} | {sent:,.0f} | {1e3 * p['seconds']['network']:.1f} | "
        yield f"{row}{span(1e3 * p['fastest'], 1e3 * p['slowest'])} | {100 * first / p['slowest']:.0f} % |"


def loss() -> Iterator[str]:
    """The softmax loss and its gradient alone, on embeddings of width 512; the towers are those of CLIP ViT-B/16."""
    yield "| topology | batch | TFLOP a chip | in bfloat16 products' time, ms | sent, MB a chip | network, ms |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in WEAK:
        topology = Topology.parse(name)
        mesh = Mesh().create(topology.devices)
        x = jax.ShapeDtypeStruct((ROWS * mesh.size, 512), jnp.float32, sharding=batch_sharding(mesh))
        with jax.set_mesh(mesh):
            gradient = jax.jit(jax.value_and_grad(lambda x, y: clip_softmax(x, y, 100.0), (0, 1)))
            flops = matmul_flops(gradient, x, x) / mesh.size
            timed = matmul_flops(gradient, x, x, passes=topology.chip.passes) / mesh.size / topology.chip.peak
            program = Program(gradient.lower(x, x).compile().as_text())
        sent = sum(c.sent for c in program.collectives) / 1e6
        network = sum(topology.seconds(c, mesh) for c in program.collectives)
        yield f"| {name} | {len(x):,} | {flops / 1e12:.3f} | {1e3 * timed:.2f} | {sent:,.0f} | {1e3 * network:.2f} |"


TABLES = {"pods": pods, "weak": weak, "loss": loss}


def draw(file: Path) -> Path:
    """The weak-scaling table of a results file as curves: bytes sent and efficiency over chips."""
    import matplotlib.pyplot as plt

    table = [
        line.strip("| ").split(" | ") for line in file.read_text().split("## weak")[1].split("## ")[0].splitlines()
    ]
    rows = [row for row in table if row[0] in WEAK]
    chips, sent = ([int(row[i].replace(",", "")) for row in rows] for i in (1, 3))
    efficiency = [float(row[6].rstrip(" %")) for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    for axis, values, label in zip(axes, (sent, efficiency), ("MB sent a chip and step", "efficiency, %"), strict=True):
        axis.plot(chips, values, marker="o", color="#2b6cb0")
        axis.set_xscale("log", base=2)
        axis.set(
            xlabel="chips (v4), 128 pairs each",
            ylabel=label,
            xticks=chips,
            xticklabels=map(str, chips),
            ylim=(0, 1.1 * max(values)),
        )
        axis.grid(alpha=0.3)
    image = ROOT / "docs/images/weak-scaling.png"
    figure.savefig(image, dpi=110)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", help=f"which of {', '.join(TABLES)}; all by default")
    lines = [f"Made by `python -m bench.scaling`, jax {jax.__version__}.", ""]
    for name in parser.parse_args().tables or TABLES:
        lines += [f"## {name}", "", *(TABLES[name].__doc__ or "").splitlines(), ""]
        for line in TABLES[name]():
            print(line, flush=True)
            lines.append(line)
        lines.append("")
    file = ROOT / f"bench/results/{datetime.date.today():%Y-%m-%d}-scaling.md"
    file.write_text("\n".join(lines))
    print(file)
    if "## weak" in lines:
        print(draw(file))


if __name__ == "__main__":
    main()
