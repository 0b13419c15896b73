"""lightly's side of `bench.peers.simclr_cifar10`: its transform, head and loss around the same network in PyTorch.

The recipe, the first weights and a probe batch come from `bench.peers.ours`; the probe's loss and gradient must agree.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bench.peers.measure import Stopwatch, peak_memory
from bench.peers.torch_networks import ResNet, ViT, load

HEAD = {"fc1": "layers/0", "norm1": "layers/1", "fc2": "layers/3", "norm2": "layers/4"}  # ours -> lightly's


@dataclass(frozen=True)
class Settings:
    """What PyTorch leaves to the user; `tune` tries them all."""

    compiled: bool = False
    channels_last: bool = False
    workers: int = 0
    pillow: bool = True  # transforms get Pillow images, or tensors


class TwoViews(Dataset):
    """Two augmented views of each image, decoded before."""

    def __init__(self, images: np.ndarray, transform: SimCLRTransform, pillow: bool):
        self.transform = transform
        planes = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        self.images = [Image.fromarray(image) for image in images] if pillow else planes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return self.transform(self.images[index])


class Trainer:
    """SimCLR as lightly's documentation writes it, with our recipe."""

    def __init__(self, source: Path, settings: Settings):
        self.recipe = recipe = json.loads((source / "recipe.json").read_text())
        self.encoder = ViT(**recipe["encoder"]) if "patch" in recipe["encoder"] else ResNet(**recipe["encoder"])
        self.head = SimCLRProjectionHead(self.encoder.out_dim, **recipe["projector"])
        initial = [(*name.split("/", 1), array) for name, array in np.load(source / "initial.npz").items()]
        load(self.encoder, {name: array for part, name, array in initial if part == "encoder"})
        head = [(*name.split("/"), array) for part, name, array in initial if part == "projector"]
        load(self.head, {f"{HEAD[layer]}/{leaf}": array for layer, leaf, array in head})
        self.loss = NTXentLoss(recipe["temperature"])
        self.format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.network = nn.Sequential(self.encoder, self.head).to(memory_format=self.format)
        self.forward = torch.compile(self.network) if settings.compiled else self.network
        decayed, others = [], []
        for name, parameter in self.network.named_parameters():
            (decayed if name.endswith("weight") and parameter.ndim > 1 else others).append(parameter)
        groups = [{"params": decayed, "weight_decay": recipe["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, **recipe["adamw"], fused=True)

    def agree(self, probe: dict[str, np.ndarray]) -> None:
        """Raises unless loss and gradient on the probe batch are ssljax's."""
        network = copy.deepcopy(self.network)
        x = torch.from_numpy(np.concatenate([probe["x1"], probe["x2"]]).transpose(0, 3, 1, 2).copy())
        loss = self.loss(*network(x).chunk(2))
        loss.backward()
        norm = torch.sqrt(sum(p.grad.double().square().sum() for p in network.parameters()))
        found = {"loss": loss.item(), "grad_norm": norm.item()}
        for name, value in found.items():
            if not np.isclose(value, probe[name], rtol=1e-3):
                raise ValueError(f"the networks differ: {name} of the probe is {value}, ssljax's is {probe[name]}")

    def step(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe["learning_rates"][index]
        x = torch.cat([x1, x2]).contiguous(memory_format=self.format)
        loss = self.loss(*self.forward(x).chunk(2))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def train(self, images: np.ndarray, settings: Settings, steps: int) -> tuple[dict, list[torch.Tensor]]:
        transform = SimCLRTransform(**self.recipe["views"])
        loader = DataLoader(
            TwoViews(images, transform, settings.pillow),
            self.recipe["batch_size"],
            shuffle=True,
            drop_last=True,
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
        )
        self.network.train()
        losses, began = [], time.perf_counter()
        while len(losses) < steps:
            for x1, x2 in loader:
                losses.append(self.step(len(losses), x1, x2))
                if len(losses) == 1:
                    first, watch = time.perf_counter() - began, Stopwatch()
                if len(losses) == steps:
                    break
        return {"first": first, "train": watch.read(), "memory": peak_memory()}, losses

    @torch.no_grad()
    def features(self, images: np.ndarray) -> np.ndarray:
        self.network.eval()
        planes = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).split(256)
        return torch.cat([self.encoder(x.float() / 255) for x in planes]).numpy()

    def step_seconds(self, repeats: int) -> dict[str, float]:
        """As in `bench.peers.ours`."""
        self.network.train()
        side = self.recipe["views"]["input_size"]
        x1, x2 = torch.rand(2, self.recipe["batch_size"], 3, side, side)
        times = []
        for _ in range(repeats + 1):
            watch = Stopwatch()
            self.step(0, x1, x2)
            times.append(watch.read())
        return {clock: median(t[clock] for t in times[1:]) for clock in ("wall", "cpu")}


def tune(source: Path, images: np.ndarray, repeats: int) -> dict:
    """The fastest settings: first of the network's step, then of the whole with its input."""
    trials: dict[str, float] = {}

    def fastest(what: str, options: list[Settings], seconds: Callable[[Settings], float]) -> Settings:
        taken = [seconds(option) for option in options]
        trials.update({f"{what}: {option}": s for option, s in zip(options, taken, strict=True)})
        return options[int(np.argmin(taken))]

    def whole_step(settings: Settings) -> float:
        return Trainer(source, settings).train(images, settings, repeats + 1)[0]["train"]["wall"] / repeats

    best = fastest(
        "network",
        [Settings(compiled, channels_last) for compiled in (False, True) for channels_last in (False, True)],
        lambda settings: Trainer(source, settings).step_seconds(repeats)["wall"],
    )
    best = fastest("whole", [replace(best, workers=workers) for workers in (0, 1, 2)], whole_step)
    best = fastest("whole, again", [best, replace(best, pillow=False)], whole_step)
    return {"settings": asdict(best), "trials": trials}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=Path, required=True, help="folder that bench.peers.ours wrote")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--synthetic", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, help="of an earlier --tune")
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    images = np.load(args.data / "train.npy")
    if args.tune:
        (args.out / "tuned.json").write_text(json.dumps(tune(args.source, images, args.synthetic)))
        return
    settings = Settings(**args.settings)
    trainer = Trainer(args.source, settings)
    trainer.agree(np.load(args.source / "probe.npz"))
    result, losses = trainer.train(images, settings, len(trainer.recipe["learning_rates"]))
    sets = {name: np.load(args.data / f"{name}.npy") for name in ("bank", "test")}
    np.savez(args.out / "trained.npz", **{name: trainer.features(x) for name, x in sets.items()})
    result |= {"loss": torch.stack(losses[-20:]).mean().item(), "step": trainer.step_seconds(args.synthetic)}
    (args.out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
