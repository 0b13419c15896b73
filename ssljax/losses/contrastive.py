"""Contrastive losses over a batch of embeddings: NT-Xent and its relatives, InfoNCE, CLIP's softmax, SigLIP's sigmoid.

All take raw embeddings [B, D] and compare by cos(u, v) = u.v / (|u| |v|): normalising beforehand changes nothing.
Products are those of the type given (float32, or bfloat16 operands with float32 sums; anything else is taken as
float32); everything after them is float32. All are means over the rows of the *global* batch, whose other rows are the
negatives, and all inputs get gradients (stop those of a momentum encoder yourself), scale, bias and temperature too.

None makes the B x B table of similarities: `ssljax.losses.sharded` sweeps it in tiles, on one device or over the mesh.
So memory is linear in the batch. Rows with `mask` False neither ask nor answer: they are no anchors and no negatives.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ssljax.losses.laws import DistillationLaw, SigmoidLaw, Softmax, SoftmaxLaw
from ssljax.losses.sharded import statistics
from ssljax.losses.sweep import Tower, product

Scalar = Float[Array, ""] | float
EPS = 1e-6  # shortest length a row is divided by


def l2_normalize(x: Float[Array, "*b d"], eps: float = EPS) -> Float[Array, "*b d"]:
    """x / max(|x|, eps) along the last axis, in float32. At x = 0 the value is 0 and the gradient finite (1 / eps)."""
    x = x.astype(jnp.float32)
    return x * _inverse_length(x, eps)[..., None]


def nt_xent(
    *views: Float[Array, "b d"],
    temperature: Scalar,
    mask: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """SimCLR's normalised temperature-scaled cross-entropy (Chen et al., 2020, eq. 1), for two or more views.

    With s(u, v) = cos(u, v) / temperature and N(i) the views of all other images, view a of image i against view b:

        l(a_i, b_i) = -log( exp s(a_i, b_i) / ( exp s(a_i, b_i) + sum_{n in N(i)} exp s(a_i, n) ) ),

    and the loss is the mean of l over images and ordered pairs of different views. For two views this is eq. 1 (the
    official code adds the two means, which is twice as much); for more, further views of the image itself are no
    negatives. `weights` multiply an image's losses (GenView; the mean still divides by the number of images). One
    image alone has no negatives: its loss is 0.
    """
    positive, negative = _against_negatives(views, temperature, mask)
    return _mean(jax.nn.softplus(negative - positive), mask, weights)


def decoupled(
    *views: Float[Array, "b d"],
    temperature: Scalar,
    sigma: float | None = None,
    mask: Bool[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """Decoupled contrastive loss (Yeh et al., ECCV 2022, eq. 6): NT-Xent without the positive in the denominator.

    l(a_i, b_i) = -w_i s(a_i, b_i) + log sum_{n in N(i)} exp s(a_i, n), as in `nt_xent`. With `sigma` w_i = 2 - exp(c_i
    / sigma) / mean_j exp(c_j / sigma), c the pairs' cosines (DCLW, eq. 7; no gradient through w), else 1. Needs at
    least two images.
    """
    if views and len(views[0]) < 2:
        raise ValueError("without negatives this loss has no lower end: it needs at least two images")
    positive, negative = _against_negatives(views, temperature, mask)
    weight: Any = 1.0
    if sigma is not None:
        e = jax.lax.stop_gradient(jnp.exp(positive * temperature / sigma))
        weight = 2 - e / (jnp.mean(e, axis=0) if mask is None else jnp.mean(e, axis=0, where=mask[:, None, None]))
    return _mean(negative - weight * positive, mask)


def debiased(
    *views: Float[Array, "b d"],
    temperature: Scalar,
    prior: float = 0.1,
    hardness: float = 0.0,
    mask: Bool[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """Debiased contrastive loss (Chuang et al., 2020, eq. 8), with hard negatives (Robinson et al., 2021, eq. 4).

    With s and N(i) of `nt_xent`, p = exp s(a_i, b_i), M the number of negatives and `prior` the probability that a
    negative is of the same class:

        R = M sum_n exp((1 + hardness) s_n) / sum_n exp(hardness s_n)        (hardness 0: the plain sum of exp s_n)
        G = max( (R - M prior p) / (1 - prior), M exp(-1 / temperature) )
        l = -log( p / (p + G) ).

    `prior` 0 and `hardness` 0 give NT-Xent.
    """
    if not 0 <= prior < 1:
        raise ValueError(f"prior is the probability that a negative is a false one, in [0, 1); got {prior}")
    positive, negative = _against_negatives(views, temperature, mask)
    images = len(positive) if mask is None else mask.sum()
    log_count = jnp.log(jnp.maximum((images - 1.0) * len(views), 1.0))
    estimate = negative
    if hardness:
        sums = [_against_negatives(views, temperature / power, mask)[1] for power in (1 + hardness, hardness)]
        estimate = sums[0] - sums[1] + log_count
    # (R - M prior p) / (1 - prior) in logarithms; where that is not positive the floor takes over.
    share = jnp.log(prior) + log_count + positive - estimate if prior else jnp.full_like(estimate, -jnp.inf)
    room = share < 0
    estimate += jnp.log1p(-jnp.exp(jnp.where(room, share, -jnp.inf))) - jnp.log1p(-prior)
    floor = log_count - 1 / temperature
    estimate = jnp.where(room, jnp.maximum(estimate, floor), floor)
    estimate = jnp.where(jnp.isneginf(negative), -jnp.inf, estimate)  # no negatives at all
    return _mean(jax.nn.softplus(estimate - positive), mask)


def sup_con(
    x: Float[Array, "n d"],
    ids: Int[Array, " n"],
    temperature: Scalar,
    mask: Bool[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """Supervised contrastive loss (Khosla et al., 2020, eq. 2, "out"): rows of equal `ids` attract.

    With s(u, v) = cos(u, v) / temperature and P(i) the other rows of the same id,

        l_i = -(1 / |P(i)|) sum_{p in P(i)} log( exp s(x_i, x_p) / sum_{a != i} exp s(x_i, x_a) ),

    and the loss is the mean over the rows with at least one positive (0 if there is none). Several views of an image
    are several rows of the same id; the paper's factor temperature / base_temperature is left out.
    """
    law = SoftmaxLaw(columns=False, counted="others", positives=True)
    stats, _ = statistics(law, _tower(x, (1 / temperature) ** 0.5, ids, mask))
    found = stats.count > 0
    losses = jnp.where(found, stats.log_sum - stats.mean_positive, 0)
    return losses.sum() / jnp.maximum(found.sum(), 1)


def info_nce(
    query: Float[Array, "b d"],
    key: Float[Array, "b d"],
    temperature: Scalar,
    negatives: Float[Array, "k d"] | None = None,
    *,
    margin: float = 0.0,
    mask: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """InfoNCE (van den Oord et al., 2018, eq. 4), one direction: each query must find its key.

    With s(u, v) = cos(u, v) / temperature, the loss is the mean over i of

        -log( exp s(q_i, k_i) / ( exp s(q_i, k_i) + sum_n exp s(q_i, n) ) ).

    The negatives n are the other keys of the batch or, where `negatives` is given, its rows alone (a queue or memory
    bank; MoCo, He et al., 2020, eq. 1). `margin` is subtracted from the positive cosine (InterCLR uses a negative one).
    """
    rows, keys = _comparable(_tower(query, 1 / temperature, mask=mask), _tower(key, mask=mask))
    positive = _pairs(rows, keys) - margin / temperature
    if negatives is None:
        stats, _ = statistics(SoftmaxLaw(columns=False, counted="different"), _numbered(rows), _numbered(keys))
    else:
        rows, bank = _comparable(rows, _tower(negatives))
        # Every row of the bank exists: a mask is about queries only.
        bank = bank if mask is None else bank._replace(valid=jnp.ones(len(bank.x), bool))
        stats, _ = statistics(SoftmaxLaw(columns=False), rows, bank, bank=True)
    return _mean(jax.nn.softplus(stats.log_sum - positive), mask, weights)


def clip_softmax(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    scale: Scalar,
    *,
    ids: Int[Array, " b"] | None = None,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    mask: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """CLIP's symmetric softmax loss (Radford et al., 2021, fig. 3).

    With S_ij = scale * cos(image_i, text_j), the loss is (1 / 2B) sum_i [ CE(S_i,:, i) + CE(S_:,i, i) ], CE(x, i) being
    -log softmax(x)_i. `scale` multiplies: pass exp(s) of the learned s, which CLIP clamps to scale <= 100.

    Args:
        ids: pairs of equal id are all positives of each other: the target is uniform over them (UniCL, Yang et al.,
            2022, eq. 3-4).
        margin: subtracted from the cosine of the pair itself (additive margin softmax; Yang et al., 2019). Not with
            `ids`.
        label_smoothing: part of the target spread evenly over all B columns, the true one included (ALIGN: 0.1).
        mask: False for rows that are no pair.
        weights: of the pairs' losses.
    """
    if ids is not None and margin:
        raise ValueError("clip_softmax takes ids or a margin: a margin belongs to one positive per row")
    images, texts = _comparable(_tower(image, scale, ids, mask), _tower(text, 1.0, ids, mask))
    if ids is None:
        images, texts = _numbered(images), _numbered(texts)
        law = SoftmaxLaw(columns=True, counted="different")
    else:
        law = SoftmaxLaw(columns=True, positives=True)
    sides = statistics(law, images, texts)

    def losses(side: Softmax, anchors: Tower, others: Tower) -> Array:
        if side.positives is None:
            target = _pairs(images, texts) - scale * margin
            losses = jax.nn.softplus(side.log_sum - target)  # a small loss is no difference of large logits
        else:
            target = side.mean_positive
            losses = side.log_sum - target
        if label_smoothing:
            losses += label_smoothing * (target - _mean_logit(anchors, others, mask))
        return losses

    return _mean((losses(sides[0], images, texts) + losses(sides[1], texts, images)) / 2, mask, weights)


def sigmoid(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    scale: Scalar,
    bias: Scalar,
    *,
    ids: Int[Array, " b"] | None = None,
    mask: Bool[Array, " b"] | None = None,
    weights: Float[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """SigLIP's pairwise sigmoid loss (Zhai et al., 2023): the sum over columns, the mean over rows.

    With S_ij = scale * cos(image_i, text_j) + bias and z_ij = 1 for i = j (for equal `ids`, if given) and -1 elsewhere,
    the loss is -(1 / B) sum_i sum_j log sigmoid(z_ij S_ij). `scale` is exp(t') of the learned t' (10 at the start);
    `bias` is learned as it is (-10 at the start).
    """
    images, texts = _comparable(_tower(image, scale, ids, mask), _tower(text, 1.0, ids, mask))
    if ids is None:
        images, texts = _numbered(images), _numbered(texts)
    losses, _ = statistics(SigmoidLaw(), images, texts, bias)
    return _mean(losses, mask, weights)


def similarity_distillation(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    teacher_image: Float[Array, "b e"],
    teacher_text: Float[Array, "b e"],
    *,
    scale: Scalar = 1.0,
    teacher_scale: Scalar = 1.0,
    only_right: bool = False,
    mask: Bool[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """KL divergence of a teacher's similarities from the student's, over rows and columns.

    With S = scale * cos(image, text) and T = teacher_scale * cos(teacher_image, teacher_text), the loss is
    (1 / 2B) sum_i [ KL(softmax T_i,: || softmax S_i,:) + KL(softmax T_:,i || softmax S_:,i) ]. The teacher gets no
    gradient. `only_right` leaves out, in each direction, the rows whose teacher prefers another partner (Mod-X, Ni et
    al., ICML 2023, where the loss is the *sum* over rows: multiply by B).
    """
    teachers = [jax.lax.stop_gradient(_tower(x, s)) for x, s in ((teacher_image, teacher_scale), (teacher_text, 1.0))]
    teacher_pair = _pairs(*teachers)
    images, texts = _comparable(_tower(image, scale, mask=mask), _tower(text, mask=mask))
    teachers = _comparable(*teachers)
    images, texts = images._replace(teacher=teachers[0]), texts._replace(teacher=teachers[1])
    sides = statistics(DistillationLaw(columns=True), images, texts)

    def losses(side: Any) -> Array:
        # The pair's logit and the table's come from two sums of the same products.
        right = teacher_pair >= side.teacher_peak - 1e-4 * jnp.maximum(1, jnp.abs(side.teacher_peak))
        return jnp.where(right, side.kl, 0) if only_right else side.kl

    return _mean((losses(sides[0]) + losses(sides[1])) / 2, mask)


def dots(rows: Float[Array, "b d"], columns: Float[Array, "c d"]) -> Float[Array, "b c"]:
    """The table of all inner products rows_i . columns_j, in true float32 on every platform.

    The default precision of TPUs (bfloat16) and recent GPUs (TF32) errs by up to 1e-3 in a cosine, which CLIP's scale
    of 100 turns into 0.1 in a logit.
    """
    return product("bd,cd->bc", rows, columns)


def _inverse_length(x: Float[Array, "*b d"], eps: float = EPS) -> Float[Array, "*b"]:
    x = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1), eps**2))


def _tower(x: Array, scale: Any = 1.0, ids: Array | None = None, mask: Array | None = None) -> Tower:
    if x.ndim != 2:
        raise ValueError(f"embeddings must be [rows, dim], got shape {list(x.shape)}")
    for name, values in (("ids", ids), ("mask", mask)):
        if values is not None and values.shape != x.shape[:1]:
            raise ValueError(f"{name} must have one entry per row: {len(x)} rows, shape {list(values.shape)}")
    x = x if x.dtype in (jnp.float32, jnp.bfloat16) else x.astype(jnp.float32)
    return Tower(x, _inverse_length(x) * jnp.asarray(scale, jnp.float32), ids, None, mask)


def _numbered(tower: Tower) -> Tower:
    """Row i belongs to row i of the other side alone."""
    return tower._replace(ids=jnp.arange(len(tower.x), dtype=jnp.int32))


def _comparable(a: Tower, b: Tower) -> tuple[Tower, Tower]:
    """Both in one type: the wider of the two."""
    if a.x.shape[1] != b.x.shape[1]:
        raise ValueError(f"embeddings of widths {a.x.shape[1]} and {b.x.shape[1]} cannot be compared")
    dtype = jnp.promote_types(a.x.dtype, b.x.dtype)
    return a._replace(x=a.x.astype(dtype)), b._replace(x=b.x.astype(dtype))


def _pairs(rows: Tower, columns: Tower) -> Float[Array, " b"]:
    """The logits of the pairs (i, i)."""
    products = rows.x.astype(jnp.float32) * columns.x.astype(jnp.float32)
    return products.sum(-1) * rows.factor * columns.factor


def _mean_logit(rows: Tower, columns: Tower, mask: Array | None) -> Float[Array, " b"]:
    """The mean of a row's logits over all columns: its product with the mean column."""
    weight = columns.factor if mask is None else jnp.where(mask, columns.factor, 0)
    count = len(columns.x) if mask is None else jnp.maximum(mask.sum(), 1)
    column = jnp.sum(columns.x.astype(jnp.float32) * weight[:, None], axis=0) / count
    return jnp.sum(rows.x.astype(jnp.float32) * column, axis=-1) * rows.factor


def _against_negatives(views: tuple[Array, ...], temperature: Any, mask: Array | None) -> tuple[Array, Array]:
    """Of all P pairs of views: their logits [B, P, 1], and the log-sum-exp of the negatives of both ends [B, P, 2]."""
    if len(views) < 2:
        raise ValueError(f"a contrastive loss over views needs at least two, got {len(views)}")
    if len({x.shape for x in views}) > 1:
        raise ValueError(f"views must be alike, one row per example each; got shapes {[list(x.shape) for x in views]}")
    size, count = len(views[0]), len(views)
    # Image by image, so that rows stay on the devices they came from.
    rows = jnp.stack(views, axis=1).reshape(size * count, -1)
    ids = jnp.repeat(jnp.arange(size, dtype=jnp.int32), count)
    valid = None if mask is None else jnp.repeat(mask, count)
    tower = _tower(rows, (1 / temperature) ** 0.5, ids, valid)  # it is both sides: half of 1 / temperature each
    stats, _ = statistics(SoftmaxLaw(columns=False, counted="different"), tower)
    factor, negative = tower.factor.reshape(size, count), stats.log_sum.reshape(size, count)
    pairs = list(itertools.combinations(range(count), 2))
    positive = [_pairs(*(Tower(views[u], factor[:, u]) for u in pair)) for pair in pairs]
    return jnp.stack(positive, axis=1)[:, :, None], negative[:, jnp.array(pairs)]


def _mean(
    losses: Float[Array, "b *pairs"], mask: Array | None = None, weights: Array | None = None
) -> Float[Array, ""]:
    """The mean over pairs, then over the rows of the mask, each row times its weight; 0 if the mask is empty."""
    losses = losses.reshape(len(losses), -1).mean(axis=1)
    if mask is not None:
        losses = jnp.where(mask, losses, 0)
    if weights is not None:
        losses = losses * weights
    return losses.sum() / (len(losses) if mask is None else jnp.maximum(mask.sum(), 1))
