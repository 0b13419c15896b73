"""ssljax's side of `bench.peers.simclr_cifar10`: one run in a process of its own."""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import jax
import numpy as np

from bench.peers.measure import Stopwatch, peak_memory
from configs.simclr import VARIANTS
from ssljax.config import Experiment, build
from ssljax.data import Arrays
from ssljax.method import Context
from ssljax.models import ResNet
from ssljax.rules import leaf_name
from ssljax.run import Run
from ssljax.views import View, Views

PROBE = 32  # rows of the batch on which both networks must agree


def experiment(network: str, steps: int, seed: int, data: Path) -> Experiment:
    """The config as it stands, but for what lightly fixes: bilinear crops, a full batch norm at the projector's end."""
    config = VARIANTS[{"resnet": "cifar10_mini", "vit": "cifar10_mini_vit"}[network]]()
    config.steps, config.seed, config.optim.warmup, config.evals = steps, seed, steps // 20, {}
    config.method.projector.last_norm = "full"
    for view in config.data.views.views.values():
        view.interpolation = "bilinear"
    built = config.to_dict()
    built["data"]["train"] = Arrays({"image": np.load(data / "train.npy")})
    return build(Experiment, built)


def flat(tree: dict) -> dict[str, np.ndarray]:
    return {leaf_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def recipe(e: Experiment) -> dict:
    """What the other side needs to do the same, as numbers."""
    encoder, view = e.method.encoder, e.data.views.views["x1"]
    if isinstance(encoder, ResNet):
        shape = dict(zip(("blocks", "channels"), zip(*encoder.stages, strict=True), strict=True))
    else:
        shape = {name: getattr(encoder, name) for name in ("image_size", "patch", "width", "depth", "heads")}
    schedule = e.optim.lr_schedule(e.steps, e.batch_size)
    return {
        "encoder": shape,
        "projector": {"hidden_dim": e.method.projector.hidden[0], "output_dim": e.method.projector.out_dim},
        "temperature": e.method.temperature,
        "batch_size": e.batch_size,
        "learning_rates": [float(schedule(step)) for step in range(e.steps)],
        "adamw": {"betas": [e.optim.b1, e.optim.b2], "eps": e.optim.eps},
        "weight_decay": e.optim.weight_decay,
        "views": {
            "input_size": view.size,
            "cj_prob": view.jitter,
            "cj_strength": 1.0,
            "cj_bright": view.brightness,
            "cj_contrast": view.contrast,
            "cj_sat": view.saturation,
            "cj_hue": view.hue,
            "min_scale": view.scale[0],
            "random_gray_scale": view.grayscale,
            "gaussian_blur": view.blur,
            "hf_prob": view.flip,
            "normalize": None,
        },
    }


def probe(run: Run, state) -> dict[str, np.ndarray]:
    """A batch, and the loss and the gradient's norm on it at the start."""
    x1, x2 = np.random.default_rng(0).uniform(size=(2, PROBE, 32, 32, 3)).astype(np.float32)
    key = jax.random.key(0)

    @jax.jit
    def loss(params):
        ctx = Context(key, state.step, state.step / run.experiment.steps)
        return run.experiment.method.loss(params, state.method, {"x1": x1, "x2": x2}, ctx)[0]

    value, grads = jax.value_and_grad(loss)(state.params)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in flat(grads).values()))
    return {"x1": x1, "x2": x2, "loss": np.asarray(value), "grad_norm": norm}


def step_seconds(e: Experiment, repeats: int) -> dict[str, float]:
    """Median seconds of a step whose images are fixed and not augmented: network, loss and optimiser alone."""
    plain = View(e.data.views.views["x1"].size, crop="none")
    run = Run(replace(e, data=replace(e.data, views=Views({"x1": plain, "x2": plain}))))
    state, step = run.init(), run.compile_step()
    batch = run.place(next(run.batches(0)))
    times = []
    for _ in range(repeats + 1):
        watch = Stopwatch()
        state, *_ = jax.block_until_ready(step(state, batch))
        times.append(watch.read())
    return {clock: median(t[clock] for t in times[1:]) for clock in ("wall", "cpu")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", choices=("resnet", "vit"), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of train.npy, test.npy and bank.npy")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--synthetic", type=int, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    e = experiment(args.network, args.steps, args.seed, args.data)
    run = Run(e, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        state = run.init()
        (args.out / "recipe.json").write_text(json.dumps(recipe(e)))
        np.savez(args.out / "initial.npz", **flat(state.params))
        np.savez(args.out / "probe.npz", **probe(run, state))
        encoder = run.encoder()

        def features(state) -> dict[str, np.ndarray]:
            frozen = encoder.at(state.params, state.method)
            return {name: frozen.images(np.load(args.data / f"{name}.npy"))["image"] for name in ("bank", "test")}

        np.savez(args.out / "random.npz", **features(state))

        began = time.perf_counter()
        step, batches = run.compile_step(), run.batches(0)
        losses = []
        for i in range(args.steps):
            state, metrics, _ = step(state, run.place(next(batches)))
            losses.append(metrics["loss"])
            if i == 0:
                jax.block_until_ready(state)
                first, watch = time.perf_counter() - began, Stopwatch()
        jax.block_until_ready(state)
        train, memory = watch.read(), peak_memory()
        np.savez(args.out / "trained.npz", **features(state))
        result = {
            "first": first,
            "train": train,
            "memory": memory,
            "loss": float(np.mean(jax.device_get(losses[-20:]))),
            "step": step_seconds(e, args.synthetic),
        }
    (args.out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
