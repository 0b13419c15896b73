"""The run that `bench.chaos` kills: small, and with every kind of state that a run must carry over a crash."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from ssljax.losses import info_nce, l2_normalize
from ssljax.losses.prototypes import centred_softmax, cross_entropy, update_centre
from ssljax.method import ema, forward, init_net
from ssljax.views import evaluation, simclr


@dataclass(frozen=True)
class Everything:
    """No paper's method: a student with batch statistics, an EMA teacher, a queue of its outputs, and their centre."""

    encoder: nn.Module
    projector: nn.Module
    queue: int = 64
    momentum: float = 0.9

    def init(self, key, batch):
        keys = jax.random.split(key, 3)
        encoder = init_net(self.encoder, keys[0], batch["x1"])
        projector = init_net(self.projector, keys[1], jnp.zeros((1, self.encoder.out_dim)))
        nets = {"encoder": encoder, "projector": projector}
        params = {name: net["params"] for name, net in nets.items()}
        stats = {name: net["stats"] for name, net in nets.items()}
        width = self.projector.out_dim
        queue = l2_normalize(jax.random.normal(keys[2], (self.queue, width)))
        teacher = {"params": params, "stats": stats}
        return params, {"stats": stats, "teacher": teacher, "queue": queue, "centre": jnp.zeros(width)}

    def project(self, params, stats, x):
        h, encoder = forward(self.encoder, params["encoder"], stats["encoder"], x)
        z, projector = forward(self.projector, params["projector"], stats["projector"], h["features"])
        return z, {"encoder": encoder, "projector": projector}

    def loss(self, params, state, batch, ctx):
        z, stats = self.project(params, state["stats"], batch["x1"])
        teacher = state["teacher"]
        target, teacher_stats = self.project(teacher["params"], teacher["stats"], batch["x2"])
        target = jax.lax.stop_gradient(target)
        contrast = info_nce(l2_normalize(z), l2_normalize(target), 0.2, state["queue"])
        distill = cross_entropy(centred_softmax(target, state["centre"], 0.1), z, 0.1).mean()
        rows = jnp.arange(len(batch["index"])) + 1
        state = {
            "stats": stats,
            "teacher": {**teacher, "stats": teacher_stats},
            "queue": jnp.concatenate([l2_normalize(target), state["queue"]])[: self.queue],
            "centre": update_centre(state["centre"], target, 0.9),
        }
        metrics = {"loss/contrast": contrast, "loss/distill": distill}
        metrics["order"] = jnp.sum(batch["index"] * rows).astype(jnp.float32)  # of the samples; exact below 2^24
        return contrast + 0.1 * distill, (state, metrics)

    def update(self, params, state, ctx):
        teacher = state["teacher"]
        moved = ema(teacher["params"], params, self.momentum)
        return params, {**state, "teacher": {**teacher, "params": moved}}

    def features(self, params, state, batch):
        h, _ = forward(self.encoder, params["encoder"], state["stats"]["encoder"], batch["image"], train=False)
        return {"image": h["features"]}


def run() -> ConfigDict:
    """Sixty steps, quick to make; a checkpoint every three."""
    return ConfigDict(
        {
            "method": {
                "type": Everything,
                "encoder": {"type": "ResNet", "depth": 8, "blocks": (1, 1), "channels": (8, 16), "width": 1},
                "projector": {"type": "Projector", "hidden": (16,), "out_dim": 16},
            },
            "data": {
                "train": None,
                "size": 8,
                "views": {"type": "Views", "views": simclr(8, strength=0.5, blur=False)},
                "eval_view": {"type": "Views", "views": evaluation(8)},
                "loader": {"threads": 2},
            },
            "steps": 60,
            "batch_size": 24,  # divides over 1, 2, 3, 4 and 8 devices
            "log_every": 1,
            "optim": {"name": "adamw", "lr": 5e-4, "warmup": 5, "weight_decay": 0.05, "ema": 0.9},
            "checkpoint": {"every": 3, "keep_last": 3},
            "heartbeats": {"every": 1.0, "silence": 20.0},
        }
    )


VARIANTS = {"run": run}
