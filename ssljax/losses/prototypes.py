"""Losses over prototypes: SwAV, DINO, iBOT and DINOv2.

A student's scores against K prototypes, the logits [.., K], are to match targets [.., K] that a teacher (or the other
view) sets: by Sinkhorn's balanced assignment or by a centred softmax. Targets and losses are of the *global* batch and
in float32, whatever the floating dtype of the scores; targets carry no gradient.

With K of up to 131,072 the tables [B, K] are the memory of these losses. So nothing here moves one between devices:
only vectors [K] are summed over rows that lie on several devices. Keep the rows in their own axis (views [V, B, K],
not [V * B, K]), and they stay where they are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def sinkhorn(
    scores: Float[Array, "b k"],
    epsilon: Float[Array, ""] | float,
    iterations: int = 3,
    mask: Bool[Array, " b"] | None = None,
    queue: Float[Array, "q k"] | None = None,
) -> Float[Array, "b k"]:
    """Soft assignments of rows to prototypes that give every prototype the same share (Caron et al., 2020, eq. 5).

    From Q = exp(scores / epsilon), each iteration divides Q by its column sums, then by its row sums. So the rows of
    the result sum to 1, and its columns to about B / K. No iteration leaves softmax(scores / epsilon), the ablation.

    Args:
        scores: rows against prototypes.
        epsilon: the entropy's weight; 0.05 in SwAV, the teacher's temperature in DINOv2.
        iterations: 3 in SwAV and DINOv2; SEER took 10, with epsilon 0.03.
        mask: False for padding rows; they count for nothing and get zeros.
        queue: scores of earlier rows, which take part in the balance and are not returned.

    The official codes hold Q itself. Its exponential overflows from scores / epsilon = 88 on (swav, dinov2), or, with
    the largest score subtracted (vissl), rows far below it vanish. Here Q = exp(scores / epsilon - u - v), and only the
    logarithms u [K] and v [B] of the divisors change.
    """
    if iterations < 0:
        raise ValueError(f"iterations={iterations}; use 0 or more")
    if queue is not None and queue.shape[1] != scores.shape[1]:
        raise ValueError(f"scores and queue must be of the same prototypes; got {scores.shape[1]} and {queue.shape[1]}")
    if mask is not None and mask.shape != scores.shape[:1]:
        raise ValueError(f"mask must have one entry per row of scores {scores.shape}; got {mask.shape}")

    def logits(x: Array) -> Array:
        return jax.lax.stop_gradient(x.astype(jnp.float32) / epsilon)

    # The queue stays a block of its own: to join it to the batch would move rows between devices.
    blocks = [(logits(scores), None if mask is None else mask[:, None])]
    if queue is not None:
        blocks.append((logits(queue), None))
    u, v = jnp.zeros(scores.shape[1]), [jnp.zeros((len(x), 1)) for x, _ in blocks]
    for _ in range(iterations):
        sums = [jax.nn.logsumexp(x - v_x, axis=0, where=rows) for (x, rows), v_x in zip(blocks, v, strict=True)]
        u = jax.nn.logsumexp(jnp.stack(sums), axis=0)
        v = [jax.nn.logsumexp(x - u, axis=1, keepdims=True) for x, _ in blocks]
    assignments = jax.nn.softmax(blocks[0][0] - u, axis=1)
    return assignments if mask is None else jnp.where(mask[:, None], assignments, 0.0)


def centred_softmax(
    teacher: Float[Array, "*b k"], centre: Float[Array, " k"], temperature: Float[Array, ""] | float
) -> Float[Array, "*b k"]:
    """DINO's targets (Caron et al., 2021, sec. 3.1): softmax((teacher - centre) / temperature), without gradient."""
    return jax.nn.softmax(jax.lax.stop_gradient((teacher.astype(jnp.float32) - centre) / temperature), axis=-1)


def update_centre(
    centre: Float[Array, " k"],
    teacher: Float[Array, "*b k"],
    momentum: Float[Array, ""] | float,
    mask: Bool[Array, "*b"] | None = None,
) -> Float[Array, " k"]:
    """DINO's running mean of the teacher's outputs (eq. 4): momentum * centre + (1 - momentum) * mean(teacher).

    The mean is over all rows of the global batch where `mask` is True; without any, the centre stays. A step's targets
    take the centre of the steps before it. DINOv2's iBOT averages the means of the devices instead, so that a patch
    counts more on a device where fewer are masked.
    """
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    rows = tuple(range(teacher.ndim - 1))
    if mask is None:
        mean = teacher.mean(axis=rows)
    else:
        total = jnp.sum(teacher, axis=rows, where=mask[..., None])
        mean = jnp.where(mask.any(), total / jnp.maximum(mask.sum(), 1), centre)
    return momentum * centre + (1 - momentum) * mean


def cross_entropy(
    targets: Float[Array, "*#b k"], logits: Float[Array, "*#b k"], temperature: Float[Array, ""] | float
) -> Float[Array, "*b"]:
    """-sum_k targets_k log softmax(logits / temperature)_k, one loss per row; leading axes broadcast.

    For targets that sum to something else than 1 as well. The gradient reaches targets too; those of this module have
    theirs stopped.
    """
    if targets.shape[-1] != logits.shape[-1]:
        raise ValueError(
            f"targets and logits must be of the same prototypes; got {targets.shape[-1]} and {logits.shape[-1]}"
        )
    z = _from_largest(logits, temperature)
    targets = targets.astype(jnp.float32)
    return targets.sum(axis=-1) * _log_sum_exp(z) - (targets * z).sum(axis=-1)


def swapped_cross_entropy(
    targets: Float[Array, "t b k"], logits: Float[Array, "v b k"], temperature: Float[Array, ""] | float
) -> Float[Array, ""]:
    """Each of V student views predicts the targets of the T views other than itself (SwAV eq. 6, DINO eq. 3).

    The first T student views are those of the targets. With H the cross-entropy, the loss is

        1 / (T (V - 1) B) sum_b sum_t sum_{v != t} H(targets_tb, logits_vb).

    So do the official codes of SwAV, DINO and DINOv2 weigh their pairs, however they write the sum.
    """
    t, v = len(targets), len(logits)
    if t > v or v < 2 or targets.shape[1:] != logits.shape[1:]:
        raise ValueError(
            "targets [T, B, K] and logits [V, B, K] must agree in B and K, with V >= T and V >= 2, the first T student "
            f"views being those of the targets; got {targets.shape} and {logits.shape}"
        )
    # H is linear in its targets: all pairs, less those of a view with itself. To write out what each view is to match
    # would cost another table [V, B, K].
    z = _from_largest(logits, temperature)
    targets = targets.astype(jnp.float32)
    log_sums, mass = _log_sum_exp(z), targets.sum(axis=-1)
    everything = jnp.sum(mass.sum(axis=0) * log_sums.sum(axis=0)) - jnp.sum(targets.sum(axis=0) * z.sum(axis=0))
    itself = jnp.sum(mass * log_sums[:t]) - jnp.sum(targets * z[:t])
    return (everything - itself) / (t * (v - 1) * targets.shape[1])


def masked_cross_entropy(
    targets: Float[Array, "b n k"],
    logits: Float[Array, "b n k"],
    temperature: Float[Array, ""] | float,
    mask: Bool[Array, "b n"],
) -> Float[Array, ""]:
    """iBOT's loss of masked patches (Zhou et al., 2022, eq. 2, with DINOv2's weights).

    The mean over an image's masked patches (`mask` True), then the mean over all B images, in which one without masked
    patches counts as 0. DINOv2 sums what it packed, [M, K], instead: (weights * cross_entropy(..)).sum() / B with the
    weights 1 / (masked patches of the image), 0 for padding.
    """
    if not targets.shape[:2] == logits.shape[:2] == mask.shape:
        raise ValueError(
            "targets [B, N, K], logits [B, N, K] and mask [B, N] must agree in B and N; "
            f"got {targets.shape}, {logits.shape} and {mask.shape}"
        )
    loss = jnp.where(mask, cross_entropy(targets, logits, temperature), 0.0)
    return jnp.mean(loss.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1))


def _from_largest(logits: Float[Array, "*b k"], temperature: Float[Array, ""] | float) -> Float[Array, "*b k"]:
    """(logits - the row's largest) / temperature, in float32: losses near 0 do not drown in large logits."""
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    return (logits.astype(jnp.float32) - largest) / temperature


@jax.custom_jvp
def _log_sum_exp(z: Float[Array, "*b k"]) -> Float[Array, "*b"]:
    """log sum_k exp z_k for rows whose largest entry is 0.

    The derivative is written as exp(z - log_sum_exp), not as exp(z) / sum. Sharing no table with the value, it is
    computed anew from the logits where it is used; exp(z) or log softmax would be kept for it, float32 tables [.., K].
    """
    return jnp.log(jnp.exp(z).sum(axis=-1))


@_log_sum_exp.defjvp
def _log_sum_exp_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (z,), (tangent,) = primals, tangents
    value = _log_sum_exp(z)
    return value, jnp.sum(jnp.exp(z - value[..., None]) * tangent, axis=-1)
