"""Contrastive losses side by side: ours, the dense table in jnp, open_clip, Inf-CL and optax; with all gradients.

    python -m bench.contrastive                              # 8,192 x 512, float32, on this machine
    python -m bench.contrastive --rows 65536 --only ours     # a table that does not fit; peak memory of the process
    python -m bench.contrastive --rows 128 --only nt_xent,optax   # optax holds [2B, 2B, 2B]
    python -m bench.contrastive --memory                     # compiled memory at 16k, 65k and 262k rows; no run

Every candidate runs in a process of its own that stays alive; the rounds go round robin, one step of each after the
other, so that a busy machine slows all alike. Reported: the median of the ratios of the first candidate's time to the
others' in the same round, their spread, the fastest and the median step, and by how much the process grew from before
its first step to its peak. The fastest step is one whose memory was at hand; candidates that need much get it anew from
the kernel in most.
`open_clip` (open_clip_torch, torch) and `inf-cl` (GPU) are skipped with a reason where they are not installed; point
`--peer-python` at an environment that has them.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

CANDIDATES = ("ours", "dense", "open_clip", "inf_cl")


def embeddings(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit pairs that are hard to tell from the rest, as in training."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(rows, width)).astype(np.float32)
    b = a + 3 * rng.normal(size=(rows, width)).astype(np.float32)
    return a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=1, keepdims=True)


def dense(image: Any, text: Any, scale: Any) -> Any:
    """CLIP's softmax loss from the whole table; jax arrays."""
    import jax
    import jax.numpy as jnp

    logits = scale * jnp.einsum("id,jd->ij", image, text, precision="highest", preferred_element_type=jnp.float32)
    both = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)
    return jnp.mean(both / 2 - jnp.diag(logits))


def jax_step(name: str, rows: int, width: int, dtype: str) -> Callable[[], float]:
    """One step of a candidate in jax: value and gradients of both towers and the scale."""
    import jax
    import jax.numpy as jnp
    import optax

    from ssljax.losses import clip_softmax, nt_xent

    def theirs(a: Any, b: Any, scale: Any) -> Any:
        labels = jnp.tile(jnp.arange(len(a)), 2)
        return optax.losses.ntxent(jnp.concatenate([a, b]), labels, 1 / scale)

    def two_views(a: Any, b: Any, scale: Any) -> Any:
        return nt_xent(a, b, temperature=1 / scale)

    loss = {"ours": clip_softmax, "dense": dense, "nt_xent": two_views, "optax": theirs}[name]
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    arguments = [*(jnp.asarray(x, dtype) for x in embeddings(rows, width)), jnp.float32(14.3)]
    step = step.lower(*arguments).compile()

    def run() -> float:
        return float(jax.block_until_ready(step(*arguments))[0])

    return run


def torch_step(name: str, rows: int, width: int, dtype: str) -> Callable[[], float]:
    """One step of a candidate in torch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    towers = [torch.tensor(x, device=device, dtype=getattr(torch, dtype)) for x in embeddings(rows, width)]
    scale = torch.tensor(14.3, device=device)
    for x in (*towers, scale):
        x.requires_grad_()
    if name == "open_clip":
        from open_clip import ClipLoss

        loss = ClipLoss()
    else:
        from inf_cl import cal_flash_loss

        def loss(image: Any, text: Any, scale: Any) -> Any:
            return (cal_flash_loss(image, text, scale=scale) + cal_flash_loss(text, image, scale=scale)).mean() / 2

    def run() -> float:
        for x in (*towers, scale):
            x.grad = None
        value = loss(*towers, scale)
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(value)

    return run


def serve(name: str, rows: int, width: int, dtype: str) -> None:
    """A candidate's process: a step for every line it reads. Answers seconds, loss and growth of memory, as JSON."""
    import psutil

    process = psutil.Process()
    step = (torch_step if name in ("open_clip", "inf_cl") else jax_step)(name, rows, width, dtype)
    before, peak, done = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    threading.Thread(target=watch, daemon=True).start()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "loss": loss, "growth": (peak - before) / 2**20}), flush=True)


class Candidate:
    """A process that runs one step of one implementation whenever asked."""

    def __init__(self, name: str, options: argparse.Namespace):
        python = options.peer_python if name in ("open_clip", "inf_cl") else sys.executable
        sizes = ["--rows", str(options.rows), "--width", str(options.width), "--dtype", options.dtype]
        self._process = subprocess.Popen(
            [python, "-m", "bench.contrastive", "--serve", name, *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},  # as `ssljax` sets it, for all
        )
        self._read()

    def step(self) -> dict[str, float]:
        assert self._process.stdin is not None
        print("step", file=self._process.stdin, flush=True)
        return self._read()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._process.stderr.read().strip().splitlines()[-1:])
        return json.loads(line)


def measure(options: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """(candidate, its steps), after one step to warm up."""
    names = options.only.split(",") if options.only else CANDIDATES
    running: dict[str, Candidate] = {}
    for name in names:
        try:
            running[name] = Candidate(name, options)
            warm = running[name].step()
            print(f"{name}: loss {warm['loss']:.6f}, first step {warm['seconds']:.2f} s", flush=True)
        except RuntimeError as error:
            print(f"{name}: left out ({error})", flush=True)
            running.pop(name, None)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    for _ in range(options.rounds):
        for name, candidate in running.items():
            steps[name].append(candidate.step())
    for candidate in running.values():
        candidate.stop()
    yield from steps.items()


def report(options: argparse.Namespace) -> None:
    print(f"{options.rows} x {options.width} {options.dtype}, {options.rounds} rounds")
    results = dict(measure(options))
    first = next(iter(results))
    print(f"\n| loss | {first} / it: median | min to max | median step, s | fastest, s | growth of the process, MiB |")
    print("|---|---|---|---|---|---|")
    for name, steps in results.items():
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(results[first], steps, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        seconds, growth = [s["seconds"] for s in steps], max(s["growth"] for s in steps)
        times = f"{np.median(seconds):.3g} | {min(seconds):.3g}"
        print(f"| {name} | {np.median(ratios):.2f} | {spread} | {times} | {growth:.0f} |")


def memory(width: int, dtype: str) -> None:
    """XLA's own figures for temporary memory; the dense form is only compiled."""
    import jax
    import jax.numpy as jnp

    from ssljax.losses import clip_softmax

    def temporary(loss: Any, rows: int) -> float:
        x = jax.ShapeDtypeStruct((rows, width), dtype)
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        analysis = step.lower(x, x, jax.ShapeDtypeStruct((), jnp.float32)).compile().memory_analysis()
        return analysis.temp_size_in_bytes / 2**20

    print("| rows | ours, MiB | dense, MiB | share |\n|---|---|---|---|")
    for rows in (16_384, 65_536, 262_144):
        ours, table = temporary(clip_softmax, rows), temporary(dense, rows)
        print(f"| {rows} | {ours:.0f} | {table:.0f} | {ours / table:.2%} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="comma-separated names of candidates; the first is compared with the others")
    parser.add_argument("--peer-python", default=sys.executable, help="Python with torch and open_clip_torch")
    parser.add_argument("--memory", action="store_true", help="compiled memory instead of time")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.rows, arguments.width, arguments.dtype)
    elif arguments.memory:
        memory(arguments.width, arguments.dtype)
    else:
        report(arguments)
