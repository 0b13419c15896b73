"""What labels would have bought: the encoder of a SimCLR config trained with cross-entropy on the same budget.

    JAX_PLATFORMS=cpu python -m bench.supervised --config configs/simclr.py:cifar10_mini --workdir runs/supervised

Same network, pictures, augmentations, batch size, steps and optimiser; a linear layer on the features instead of the
projector, cross-entropy on both views instead of NT-Xent. Scored as the config scores SimCLR: on frozen features.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import optax
from flax import linen as nn
from rich import print as show

from ssljax.config import Experiment, build, load_config
from ssljax.method import Array, Batch, Context, Metrics, Params, State, forward, init_net, pair_rows
from ssljax.methods.image.simclr import SimCLR
from ssljax.summary import table
from ssljax.train import train


@dataclass(frozen=True)
class Supervised:
    """Cross-entropy of a linear layer on the encoder's features. Batch: `x1`, `x2` [B, H, W, 3], `label` int32 [B]."""

    encoder: nn.Module
    classes: int

    def init(self, key: Array, batch: Batch) -> tuple[Params, State]:
        encoder = init_net(self.encoder, key, batch["x1"])
        h, _ = forward(self.encoder, encoder["params"], encoder["stats"], batch["x1"], train=False)
        head = init_net(nn.Dense(self.classes), key, h["features"])
        return {"encoder": encoder["params"], "head": head["params"]}, {"encoder": encoder["stats"]}

    def loss(self, params: Params, state: State, batch: Batch, ctx: Context) -> tuple[Array, tuple[State, Metrics]]:
        x, label = pair_rows(batch["x1"], batch["x2"]), pair_rows(batch["label"], batch["label"])
        h, stats = forward(self.encoder, params["encoder"], state["encoder"], x, key=ctx.key)
        logits = nn.Dense(self.classes).apply({"params": params["head"]}, h["features"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        return loss, ({"encoder": stats}, {"accuracy": (logits.argmax(1) == label).mean()})

    def update(self, params: Params, state: State, ctx: Context) -> tuple[Params, State]:
        return params, state

    features = SimCLR.features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides).to_dict()
    config["method"] = {"type": Supervised, "encoder": config["method"]["encoder"], "classes": args.classes}
    train(build(Experiment, config), args.workdir)
    show(table([args.workdir]))


if __name__ == "__main__":
    main()
