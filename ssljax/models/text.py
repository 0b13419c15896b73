"""Text transformer: CLIP's causal tower, SigLIP's and BERT-like bidirectional ones."""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ssljax.models.transformer import Activation, Init, Remat, Transformer


class TextTransformer(nn.Module):
    """Encoder of token ids; defaults: the text tower of CLIP ViT-B (Radford et al., 2021) before its projection."""

    vocab_size: int = 49_408
    context_length: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_dim: int | None = None  # None: four times the width
    causal: bool = True
    pool: Literal["eos", "argmax", "last", "mean", "cls"] = "argmax"
    eos_id: int | None = None  # for pool="eos"
    pad_id: int | None = 0  # hidden from the bidirectional form and from pool="mean"; None: nothing is
    projection: int | None = None  # width of a last linear layer, on the features only
    projection_bias: bool = False  # True for SigLIP
    activation: Activation = "quick_gelu"
    drop_path: float = 0.0
    norm_eps: float = 1e-5
    kernel_init: Init = "clip"
    remat: Remat = "none"
    scan: bool = False
    dtype: Any = None

    @property
    def out_dim(self) -> int:
        """Width of the features."""
        return self.projection or self.width

    @nn.compact
    def __call__(self, tokens: Int[Array, "b n"], train: bool = False) -> dict[str, Array]:
        """Returns "features" float32 [b, out_dim] and "tokens" [b, n, width], the normalised last states.

        The features are the state at the first `eos_id` ("eos"), at the largest id ("argmax": CLIP's end of text), at
        the last or the first place ("last", "cls"), or the average over what is not padding ("mean").
        """
        length = tokens.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"TextTransformer: {length} tokens do not fit the context of {self.context_length}; "
                "truncate the texts or raise context_length"
            )
        embed = nn.Embed(
            self.vocab_size, self.width, self.dtype, embedding_init=nn.initializers.normal(0.02), name="token_embed"
        )
        table = self.param("positions", nn.initializers.normal(0.01), (self.context_length, self.width))
        x = embed(tokens)
        x = x + table[:length].astype(x.dtype)
        real = jnp.ones(tokens.shape, bool) if self.pad_id is None else tokens != self.pad_id
        x = Transformer(
            depth=self.depth,
            heads=self.heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            causal=self.causal,
            drop_path=self.drop_path,
            norm_eps=self.norm_eps,
            kernel_init=self.kernel_init,
            remat=self.remat,
            scan=self.scan,
            dtype=self.dtype,
            name="transformer",
        )(x, mask=None if self.causal or self.pad_id is None else real[:, None, None], train=train)
        x = nn.LayerNorm(self.norm_eps, self.dtype, name="norm")(x)
        features = self._pool(x, tokens, real)
        if self.projection:
            init = nn.initializers.normal(self.width**-0.5)
            dense = partial(nn.Dense, self.projection, self.projection_bias, self.dtype, kernel_init=init)
            features = dense(name="projection")(features)
        return {"features": features.astype(jnp.float32), "tokens": x}

    def _pool(self, x: Float[Array, "b n d"], tokens: Array, real: Array) -> Float[Array, "b d"]:
        match self.pool:
            case "cls":
                return x[:, 0]
            case "last":
                return x[:, -1]
            case "mean":
                weight = real[..., None] / jnp.maximum(real.sum(axis=1), 1)[:, None, None]
                return jnp.sum(x * weight, axis=1)
            case "argmax":
                at = jnp.argmax(tokens, axis=1)
            case "eos":
                if self.eos_id is None:
                    raise ValueError('TextTransformer: pool="eos" needs eos_id, the id of the token that ends a text')
                at = jnp.argmax(tokens == self.eos_id, axis=1)
        return jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
