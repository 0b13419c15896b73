"""Contrastive losses over a batch of paired embeddings: NT-Xent, InfoNCE, CLIP's softmax and SigLIP's sigmoid.

All take raw embeddings [B, D] in any floating dtype, compute in float32 and compare by cos(u, v) = u.v / (|u| |v|):
normalising beforehand changes nothing. All are means over the rows of the *global* batch, whose other rows are the
negatives, and all inputs get gradients (stop those of a momentum encoder yourself). Under a context mesh whose
`replica` and `fsdp` axes span several devices, each device computes its rows of the table against gathered columns
(`over_batch_shards`); values and gradients are the same.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ssljax.losses.sharded import Rows, over_batch_shards


def l2_normalize(x: Float[Array, "*b d"], eps: float = 1e-6) -> Float[Array, "*b d"]:
    """x / max(|x|, eps) along the last axis, in float32. At x = 0 the value is 0 and the gradient finite (1 / eps)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps**2))


def dots(rows: Float[Array, "b d"], columns: Float[Array, "c d"]) -> Float[Array, "b c"]:
    """The table of all inner products rows_i . columns_j, in true float32 on every platform.

    The default precision of TPUs (bfloat16) and recent GPUs (TF32) errs by up to 1e-3 in a cosine, which CLIP's scale
    of 100 turns into 0.1 in a logit.
    """
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("bd,cd->bc", rows, columns, precision=highest, preferred_element_type=jnp.float32)


def nt_xent(a: Float[Array, "b d"], b: Float[Array, "b d"], temperature: Float[Array, ""] | float) -> Float[Array, ""]:
    """SimCLR's normalised temperature-scaled cross-entropy (Chen et al., 2020, eq. 1), over 2B rows.

    With s(u, v) = cos(u, v) / temperature,

        l(a_i) = -log( exp s(a_i, b_i) / ( sum_k exp s(a_i, b_k) + sum_{k != i} exp s(a_i, a_k) ) ),

    l(b_i) the same with a and b exchanged, and the loss is (1 / 2B) sum_i [l(a_i) + l(b_i)]. The official code adds
    the two means, which is twice this. One pair alone (B = 1) has no negatives: the loss is 0.
    """
    return over_batch_shards(_nt_xent_rows, (l2_normalize(a), l2_normalize(b)), temperature)


def info_nce(
    query: Float[Array, "b d"],
    key: Float[Array, "b d"],
    temperature: Float[Array, ""] | float,
    negatives: Float[Array, "k d"] | None = None,
) -> Float[Array, ""]:
    """InfoNCE (van den Oord et al., 2018, eq. 4), one direction: each query must find its key.

    With s(u, v) = cos(u, v) / temperature, the loss is the mean over i of

        -log( exp s(q_i, k_i) / ( exp s(q_i, k_i) + sum_n exp s(q_i, n) ) ).

    The negatives n are the other keys of the batch or, where `negatives` is given, its rows alone (MoCo's queue; He
    et al., 2020, eq. 1).
    """
    query, key = l2_normalize(query), l2_normalize(key)
    if negatives is None:
        return over_batch_shards(_info_nce_rows, (query, key), temperature)
    # No row meets another row of the batch, so the compiler splits this by rows on its own.
    positive = jnp.sum(query * key, axis=-1, keepdims=True)
    logits = jnp.concatenate([positive, dots(query, l2_normalize(negatives))], axis=1) / temperature
    return _cross_entropy(logits, jnp.zeros(len(query), jnp.int32)).mean()


def clip_softmax(
    image: Float[Array, "b d"], text: Float[Array, "b d"], scale: Float[Array, ""] | float
) -> Float[Array, ""]:
    """CLIP's symmetric softmax loss (Radford et al., 2021, fig. 3).

    With S_ij = scale * cos(image_i, text_j), the loss is (1 / 2B) sum_i [ CE(S_i,:, i) + CE(S_:,i, i) ], CE(x, i) being
    -log softmax(x)_i. `scale` multiplies: pass exp(s) of the learned s, which CLIP clamps to scale <= 100.
    """
    return over_batch_shards(_clip_rows, (l2_normalize(image), l2_normalize(text)), scale)


def sigmoid(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """SigLIP's pairwise sigmoid loss (Zhai et al., 2023): the sum over columns, the mean over rows.

    With S_ij = scale * cos(image_i, text_j) + bias and z_ij = 1 for i = j and -1 elsewhere, the loss is -(1 / B)
    sum_i sum_j log sigmoid(z_ij S_ij). `scale` is exp(t') of the learned t' (10 at the start); `bias` is learned as
    it is (-10 at the start).
    """
    return over_batch_shards(_sigmoid_rows, (l2_normalize(image), l2_normalize(text)), scale, bias)


_cross_entropy = optax.softmax_cross_entropy_with_integer_labels  # one loss per row; subtracts the largest logit first

# The losses of the rows at hand (positions `index` in the batch) against all columns; see `over_batch_shards`.


def _nt_xent_rows(rows: Rows, columns: Rows, index: Int[Array, " b"], temperature: Array | float) -> Float[Array, " b"]:
    (a, b), (all_a, all_b) = rows, columns
    itself = index[:, None] + len(all_a) == jnp.arange(2 * len(all_a))  # right half: anchors against their own view

    def one_side(anchor: Array, others: Array, same: Array) -> Array:
        logits = jnp.concatenate([dots(anchor, others), dots(anchor, same)], axis=1) / temperature
        return _cross_entropy(jnp.where(itself, -jnp.inf, logits), index)

    return (one_side(a, all_b, all_a) + one_side(b, all_a, all_b)) / 2


def _info_nce_rows(
    rows: Rows, columns: Rows, index: Int[Array, " b"], temperature: Array | float
) -> Float[Array, " b"]:
    return _cross_entropy(dots(rows[0], columns[1]) / temperature, index)


def _clip_rows(rows: Rows, columns: Rows, index: Int[Array, " b"], scale: Array | float) -> Float[Array, " b"]:
    (image, text), (images, texts) = rows, columns
    return (_cross_entropy(scale * dots(image, texts), index) + _cross_entropy(scale * dots(text, images), index)) / 2


def _sigmoid_rows(
    rows: Rows, columns: Rows, index: Int[Array, " b"], scale: Array | float, bias: Array | float
) -> Float[Array, " b"]:
    logits = scale * dots(rows[0], columns[1]) + bias
    pair = jnp.where(index[:, None] == jnp.arange(len(columns[1])), 1.0, -1.0)
    return -jax.nn.log_sigmoid(pair * logits).sum(axis=1)
