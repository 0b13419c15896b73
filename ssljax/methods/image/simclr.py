"""SimCLR: two augmented views of each image attract, all other images of the global batch repel."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssljax.losses import nt_xent
from ssljax.method import Array, Batch, Context, Metrics, Params, State, forward, init_net, pair_rows, split_pairs


@dataclass(frozen=True)
class SimCLR:
    """A simple framework for contrastive learning of visual representations (Chen et al., ICML 2020, arXiv:2002.05709).

    Batch: `x1`, `x2` float32 [B, H, W, 3], two draws of the augmentation per image. Both go through the network in one
    pass, so batch normalisation sees all 2B rows of the global batch. The loss is NT-Xent over 2B rows (eq. 1, the
    mean form; the official code adds the two means, which is twice as much). Frozen features are h, the encoder's
    output; the projector is thrown away.
    """

    paper: ClassVar[str] = "Chen et al., ICML 2020"
    supports_micro_batches: ClassVar[bool] = True

    encoder: nn.Module  # f
    projector: nn.Module  # g
    temperature: float = 0.1  # tau

    def init(self, key: Array, batch: Batch) -> tuple[Params, State]:
        encoder_key, projector_key = jax.random.split(key)
        encoder = init_net(self.encoder, encoder_key, batch["x1"])
        h, _ = forward(self.encoder, encoder["params"], encoder["stats"], batch["x1"], train=False)
        projector = init_net(self.projector, projector_key, h["features"])
        params = {"encoder": encoder["params"], "projector": projector["params"]}
        return params, {"encoder": encoder["stats"], "projector": projector["stats"]}

    def loss(self, params: Params, state: State, batch: Batch, ctx: Context) -> tuple[Array, tuple[State, Metrics]]:
        x = pair_rows(batch["x1"], batch["x2"])
        how = {"key": ctx.key, "micro_batches": ctx.micro_batches}
        h, encoder_stats = forward(self.encoder, params["encoder"], state["encoder"], x, **how)
        z, projector_stats = forward(self.projector, params["projector"], state["projector"], h["features"])
        z1, z2 = split_pairs(z.astype(jnp.float32))
        loss = nt_xent(z1, z2, temperature=self.temperature)
        return loss, ({"encoder": encoder_stats, "projector": projector_stats}, {"embeddings": (z1, z2)})

    def update(self, params: Params, state: State, ctx: Context) -> tuple[Params, State]:
        return params, state

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, Array]:
        h, _ = forward(self.encoder, params["encoder"], state["encoder"], batch["image"], train=False)
        return {"image": h["features"], "patches": h["patches"]}
