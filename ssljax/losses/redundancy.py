"""Losses that hold embeddings apart by statistics of the batch, without negatives: Barlow Twins, VICReg and KoLeo.

All take raw embeddings [B, D] in any floating dtype and compute in float32. Means, variances and covariances are those
of the *global* batch: the compiler sums [D] and [D, D] over the devices that hold its rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssljax.losses.contrastive import l2_normalize
from ssljax.losses.laws import NearestLaw
from ssljax.losses.sharded import statistics
from ssljax.losses.sweep import Tower, product


def barlow_twins(
    a: Float[Array, "b d"], b: Float[Array, "b d"], weight: Float[Array, ""] | float = 5e-3
) -> Float[Array, ""]:
    """Barlow Twins (Zbontar et al., 2021, eq. 1): the cross-correlation of two views is to be the identity.

    With each column standardised, z = (x - mean) / sqrt(var + 1e-5), var the mean of squares (1 / B), and
    C = z_a^T z_b / B,

        sum_i (1 - C_ii)^2 + weight * sum_i sum_{j != i} C_ij^2.

    A constant column correlates with nothing: C_ij = 0. The official code standardises by a synchronised BatchNorm
    (hence 1e-5) and has weight = 0.0051; it sums C over devices without gradient, which leaves gradients smaller by
    their number.
    """
    _check_pairs(a, b)

    def standardise(x: Array) -> Array:
        x = x.astype(jnp.float32) - x.mean(axis=0, dtype=jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=0) + 1e-5)

    correlation = product("bi,bj->ij", standardise(a), standardise(b)) / len(a)
    itself = jnp.eye(a.shape[1], dtype=bool)
    return jnp.sum(jnp.where(itself, (1 - correlation) ** 2, weight * correlation**2))


def vicreg(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    invariance: Float[Array, ""] | float = 25.0,
    variance: Float[Array, ""] | float = 25.0,
    covariance: Float[Array, ""] | float = 1.0,
) -> Float[Array, ""]:
    """VICReg (Bardes et al., 2022, eq. 6 with the official code's factors).

        invariance * mean (a - b)^2 + variance * (V(a) + V(b)) / 2 + covariance * (C(a) + C(b))

    The mean is over B and D, where the paper's eq. 5 sums over D; V is `variance_hinge`, whose two views the code
    averages and the paper adds, and C is `covariance_penalty`.
    """
    _check_pairs(a, b)
    difference = a.astype(jnp.float32) - b.astype(jnp.float32)
    return (
        invariance * jnp.mean(difference**2)
        + variance * (variance_hinge(a) + variance_hinge(b)) / 2
        + covariance * (covariance_penalty(a) + covariance_penalty(b))
    )


def variance_hinge(x: Float[Array, "b d"], eps: float = 1e-4) -> Float[Array, ""]:
    """VICReg's variance term (eq. 1): mean_d max(0, 1 - sqrt(var_d + eps)), var unbiased (1 / (B - 1))."""
    x = _centred(x)
    variance = jnp.sum(x * x, axis=0) / (len(x) - 1)
    return jnp.mean(jax.nn.relu(1 - jnp.sqrt(variance + eps)))


def covariance_penalty(x: Float[Array, "b d"]) -> Float[Array, ""]:
    """VICReg's covariance term (eq. 4): (1 / D) sum_i sum_{j != i} cov_ij^2, cov unbiased (1 / (B - 1))."""
    x = _centred(x)
    covariance = product("bi,bj->ij", x, x) / (len(x) - 1)
    return jnp.sum(jnp.where(jnp.eye(x.shape[1], dtype=bool), 0.0, covariance**2)) / x.shape[1]


def koleo(x: Float[Array, "b d"], groups: int = 1, eps: float = 1e-8) -> Float[Array, ""]:
    """KoLeo (Sablayrolles et al., 2019, on the unit sphere as in DINOv2): every row far from its nearest.

    With z = x / |x| and d_i = min_{j != i} |z_i - z_j|, the mean over i of -log sqrt(d_i^2 + eps^2). Which row is
    nearest is no matter of gradients; both ends of a distance move.

    Args:
        x: one row per image: DINOv2 takes each global crop by itself, for two crops of an image must not repel.
        groups: neighbours are sought within this many equal parts of consecutive rows; 1 is the global batch. The
            official code has one group per device.
        eps: bounds the loss of equal rows, whose gradient is 0. The official code adds eps to each coordinate of
            z_i - z_j and to d instead, which differs where d is not far above eps.
    """
    size = len(x)
    if groups < 1 or size % groups or size // groups < 2:
        raise ValueError(f"{size} rows do not make {groups} equal group(s) of two or more; use another `groups`")
    z = l2_normalize(x)
    fixed = jax.lax.stop_gradient(z)
    group = jnp.arange(size, dtype=jnp.int32) // (size // groups)
    nearest, _ = statistics(NearestLaw(), Tower(fixed, jnp.ones(size), ids=group))
    squared = jnp.sum((z - z[nearest.position]) ** 2, axis=1)
    # Compilers round the two ends of a distance differently: equal rows come out 1e-8 apart, in a random direction.
    squared = jnp.where(squared > jnp.finfo(jnp.float32).eps ** 2, squared, 0.0)
    return jnp.mean(-jnp.log(squared + eps**2) / 2)


def _centred(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    if len(x) < 2:
        raise ValueError("the variance of one row is undefined; use a batch of two or more")
    return x.astype(jnp.float32) - x.mean(axis=0, dtype=jnp.float32)


def _check_pairs(a: Array, b: Array) -> None:
    if a.shape != b.shape:
        raise ValueError(f"the two views must have the same shape [B, D]; got {a.shape} and {b.shape}")
