"""CLIP and SigLIP: an image tower and a text tower that agree on which caption goes with which picture."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from ssljax.losses import clip_softmax, l2_normalize, sigmoid
from ssljax.method import Array, Batch, Context, Metrics, Params, State, forward, init_net


@dataclass(frozen=True)
class CLIP:
    """Learning transferable visual models from natural language supervision (Radford et al., 2021, arXiv:2103.00020).

    Batch: `image` float32 [B, H, W, 3], `text` int32 [B, L]. With x, y the l2-normalised embeddings and
    S = exp(s) x y^T: `softmax` is the symmetric cross-entropy of S over rows and columns of the global batch; `sigmoid`
    is SigLIP's pairwise loss (Zhai et al., 2023, arXiv:2303.15343) on S + b, summed over columns, averaged over rows.

    s starts at log(1/0.07) (softmax) or log 10 with b = -10 (sigmoid). For the softmax it is clamped to [0, log 100]
    after every step; SigLIP's trainer has no clamp.
    """

    paper: ClassVar[str] = "Radford et al., ICML 2021; Zhai et al., ICCV 2023"
    supports_micro_batches: ClassVar[bool] = True

    image: nn.Module  # {"features": [B, D]}
    text: nn.Module  # {"features": [B, D]}
    objective: Literal["softmax", "sigmoid"] = "softmax"
    scale: float | None = None  # exp(s) at the start; None: 1/0.07 or 10
    bias: float = -10.0  # b at the start, sigmoid only
    max_scale: float = 100.0  # clamp of exp(s), softmax only

    def init(self, key: Array, batch: Batch) -> tuple[Params, State]:
        image_key, text_key = jax.random.split(key)
        image = init_net(self.image, image_key, batch["image"])
        text = init_net(self.text, text_key, batch["text"])
        start = self.scale or (1 / 0.07 if self.objective == "softmax" else 10.0)
        params = {"image": image["params"], "text": text["params"], "logit_scale": jnp.float32(math.log(start))}
        if self.objective == "sigmoid":
            params["logit_bias"] = jnp.float32(self.bias)
        return params, {"image": image["stats"], "text": text["stats"]}

    def loss(self, params: Params, state: State, batch: Batch, ctx: Context) -> tuple[Array, tuple[State, Metrics]]:
        image_key, text_key = jax.random.split(ctx.key)

        def encode(name: str, tower: nn.Module, key: Array) -> tuple[dict[str, Array], State]:
            parts = ctx.micro_batches
            return forward(tower, params[name], state[name], batch[name], key=key, micro_batches=parts)

        x, image_stats = encode("image", self.image, image_key)
        y, text_stats = encode("text", self.text, text_key)
        x, y = l2_normalize(x["features"]), l2_normalize(y["features"])
        scale = jnp.exp(params["logit_scale"])
        softmax = self.objective == "softmax"
        loss = clip_softmax(x, y, scale) if softmax else sigmoid(x, y, scale, params["logit_bias"])
        return loss, ({"image": image_stats, "text": text_stats}, {"logit_scale": scale, "embeddings": (x, y)})

    def update(self, params: Params, state: State, ctx: Context) -> tuple[Params, State]:
        if self.objective == "softmax":
            params = {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, math.log(self.max_scale))}
        return params, state

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, Array]:
        features = {}
        if "image" in batch:
            image, _ = forward(self.image, params["image"], state["image"], batch["image"], train=False)
            features |= {"image": image["features"], "patches": image["patches"]}
        if "text" in batch:
            text, _ = forward(self.text, params["text"], state["text"], batch["text"], train=False)
            features["text"] = text["features"]
        return features
