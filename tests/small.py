"""A tiny SimCLR and a tiny CLIP experiment, a tiny form of any config file, and helpers to run them, for tests."""

from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from ssljax.config import Experiment, apply_override, experiment, load_config
from ssljax.run import Run
from ssljax.state import TrainState

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """In test files that import this: LLVM does not optimise, so tiny networks compile in a fraction of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# A few steps of these overrides are one compilation of a second or two.
SIMCLR = (
    "steps=20",
    "batch_size=16",
    "log_every=1",
    "optim.lr=5e-4",  # gentle: rounding differences between meshes grow with the step size
    "optim.warmup=2",
    "data.size=8",
    "data.views.views.x1.size=8",
    "data.views.views.x2.size=8",
    "data.eval_view.views.image.size=8",
    "method.encoder.blocks=(1, 1)",
    "method.encoder.channels=(8, 16)",
    "method.encoder.width=1",
    "method.projector.hidden=(16,)",
    "method.projector.out_dim=8",
    "data.loader.threads=1",
    "evals={}",
)


def simclr_config(*overrides: str) -> ConfigDict:
    return load_config(f"{CONFIGS}/simclr.py:digits", (*SIMCLR, *overrides))


def simclr(*overrides: str) -> Experiment:
    return experiment(simclr_config(*overrides))


def train_command(workdir: Path, *overrides: str, options: tuple[str, ...] = ()) -> list[str]:
    """Arguments of `ssljax` for three steps of it."""
    command = ["train", "--config", f"{CONFIGS}/simclr.py:digits", "--workdir", str(workdir), "--no-report", *options]
    return [*command, *SIMCLR, "batch_size=8", "steps=3", *overrides]


def clip(*overrides: str) -> Experiment:
    """Both towers are transformers, so that the tensor axis has something to do."""
    config = load_config(f"{CONFIGS}/clip.py:scenes")
    config.method.image = {
        "type": "ViT",
        "image_size": 16,
        "patch": 8,
        "width": 32,
        "depth": 2,
        "heads": 4,
        "projection": 16,
    }
    config.method.text.update({"width": 32, "depth": 1, "projection": 16})
    small = (
        "steps=20",
        "batch_size=16",
        "log_every=1",
        "optim.lr=5e-4",
        "optim.warmup=2",
        "data.train.count=64",
        "data.train.size=16",
        "data.size=16",
    )
    sizes = (
        "data.views.views.image.size=16",
        "data.eval_view.views.image.size=16",
        "evals={}",
        "data.loader.threads=1",
    )
    for override in (*small, *sizes, *overrides):
        apply_override(config, override)
    return experiment(config)


# What makes a config tiny, by the class that its dicts name.
SIZES: dict[str, dict[str, Any]] = {
    "ResNet": {"depth": 8, "blocks": (1, 1), "channels": (8, 16), "width": 1},
    "ViT": {"image_size": 16, "patch": 4, "width": 16, "depth": 1, "heads": 2},
    "TextTransformer": {"width": 16, "depth": 1, "heads": 2},
    "Projector": {"hidden": (16,), "out_dim": 8},
    "Prototypes": {"count": 16},
    "Scenes": {"count": 64},
}
# What a method needs beyond that, by the name of its config file: overrides.
ALSO: dict[str, tuple[str, ...]] = {}


def tiny(file: Path, *overrides: str) -> Experiment:
    """The first variant of a config file with tiny networks, pictures of 16 pixels and batches of 8; no evaluations."""
    config = ConfigDict(_shrink(load_config(str(file)).to_dict()))
    run = (
        "steps=20",
        "batch_size=8",
        "log_every=1",
        "eval_every=0",
        "evals={}",
        "checkpoint={}",
        "optim.warmup=1",
        "data.loader.threads=0",
    )
    for override in (*run, *ALSO.get(file.stem, ()), *overrides):
        apply_override(config, override)
    if config.data.get("size") is not None:
        config.data.size = 16
    return experiment(config)


def _shrink(node: Any) -> Any:
    if isinstance(node, tuple | list):
        return tuple(_shrink(item) for item in node)
    if not isinstance(node, dict):
        return node
    node = {name: _shrink(value) for name, value in node.items()}
    node.update(SIZES.get(str(node.get("type")), {}))
    if node.get("projection"):
        node["projection"] = 8
    if node.get("type") == "Views":  # the largest views become 16 pixels wide, smaller ones (local crops) 8
        largest = max(view["size"] for view in node["views"].values())
        node["views"] = {
            name: {**view, "size": 16 if view["size"] == largest else 8} for name, view in node["views"].items()
        }
    return node


def run_steps(e: Experiment, devices: int, steps: int) -> tuple[list[float], TrainState]:
    """Losses of the first steps on so many devices, and the state after them."""
    run = Run(e, jax.devices()[:devices])
    with jax.set_mesh(run.mesh):
        state, step = run.init(), run.compile_step()
        batches, losses = run.batches(0), []
        for _ in range(steps):
            state, metrics, _ = step(state, run.place(next(batches)))
            losses.append(float(metrics["loss"]))
        batches.close()
    return losses, state
