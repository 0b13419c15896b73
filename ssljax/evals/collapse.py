"""Diagnostics of a batch of embeddings: does it spread over the sphere, or collapse to a point or a few directions?"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ssljax.losses import dots, l2_normalize


def collapse(a: Float[Array, "n d"], b: Float[Array, "n d"] | None = None) -> dict[str, Float[Array, ""]]:
    """Scalars that show a collapse early; `b` holds the other views, row by row (without it, two are left out).

    With u, v the l2-normalised rows of `a` and `b`:

    - `std`: sqrt(d) times the mean over dimensions of the standard deviation of u. 1 for an isotropic, 0 for a
      collapsed batch.
    - `rank`: RankMe (Garrido et al., 2023), exp of the entropy of the singular values of `a` over their sum:
      from 1 to min(n, d). Singular values below the square root of float32's resolution cannot be told from zero and
      count as zero.
    - `uniformity`: log mean_{i != j} exp(-2 |u_i - u_j|^2) (Wang & Isola, 2020); 0 is the worst.
    - `negative`: the mean of u_i.v_j over i != j (of u_i.u_j without `b`).
    - `positive`, `alignment`: the means of u_i.v_i and of |u_i - v_i|^2 (Wang & Isola, 2020).

    Always finite: one row alone has uniformity and negative 0, rows of zeros have rank 1. Takes O(n^2 + n d) memory.
    """
    a = a.astype(jnp.float32)
    n, d = a.shape
    u = l2_normalize(a)
    v = u if b is None else l2_normalize(b)
    pairs = max(n * (n - 1), 1)

    positive = jnp.sum(u * v, axis=1)
    # |u_i - u_j|^2 = |u_i|^2 + |u_j|^2 - 2 u_i.u_j, where rows of zeros have no length.
    length = jnp.sum(u * u, axis=1)
    distance = jnp.maximum(length[:, None] + length - 2 * dots(u, u), 0)
    kernel = jnp.where(jnp.eye(n, dtype=bool), 0, jnp.exp(-2 * distance))
    result = {
        "std": jnp.mean(jnp.std(u, axis=0)) * d**0.5,
        "rank": _effective_rank(a),
        "uniformity": jnp.log(jnp.sum(kernel) / pairs) if n > 1 else jnp.zeros(()),
        "negative": (jnp.sum(jnp.sum(u, axis=0) * jnp.sum(v, axis=0)) - jnp.sum(positive)) / pairs,
    }
    if b is not None:
        result |= {"positive": jnp.mean(positive), "alignment": jnp.mean(jnp.sum((u - v) ** 2, axis=1))}
    return result


def _effective_rank(x: Float[Array, "n d"]) -> Float[Array, ""]:
    tiny = jnp.finfo(jnp.float32).tiny
    x = x / jnp.maximum(jnp.max(jnp.abs(x)), tiny)  # squares of very large or small features stay in range
    small = x if len(x) <= x.shape[1] else x.T
    eigenvalues = jnp.linalg.eigvalsh(dots(small, small))
    noise = len(small) * jnp.finfo(jnp.float32).eps * eigenvalues[-1]
    singular = jnp.sqrt(jnp.where(eigenvalues > noise, eigenvalues, 0))
    p = singular / jnp.maximum(jnp.sum(singular), tiny)
    return jnp.exp(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, tiny)), 0)))
