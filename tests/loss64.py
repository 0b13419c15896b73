"""What tests of losses share: meshes, rows, and the contrastive losses once more.

Those are dense tables in float64, straight from the equations; their gradients are autodiff of that.

A mask is applied by cutting the masked rows out of every array: the definition of what the losses do with them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_softmax, logsumexp
from jax.sharding import AxisType


def make_mesh(shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("replica", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def rows(seed, n=16, d=6):
    """n rows, and n more that resemble them one by one."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, d)).astype(np.float32)
    return a, (a + rng.normal(size=(n, d))).astype(np.float32)


def value_and_gradients(loss, arguments):
    """In float64, as numpy."""
    with jax.enable_x64(True):
        arguments = [jnp.asarray(np.asarray(x, np.float64)) for x in arguments]
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arguments)))))(*arguments)
        return float(value), [np.asarray(g) for g in gradients]


def numeric_gradient(fn, arguments, position, h=1e-5):
    """Central differences in float64, one coordinate at a time: for references in plain numpy."""
    arguments = [np.array(x, np.float64) for x in arguments]
    gradient = np.zeros_like(arguments[position])
    for i in np.ndindex(gradient.shape):
        up, down = arguments[position].copy(), arguments[position].copy()
        up[i] += h
        down[i] -= h
        values = [fn(*arguments[:position], x, *arguments[position + 1 :]) for x in (up, down)]
        gradient[i] = (values[0] - values[1]) / (2 * h)
    return gradient


def unit(x):
    x = jnp.asarray(x, jnp.float64)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def table(a, b, scale=1.0):
    return scale * unit(a) @ unit(b).T


def cut(mask, *arrays):
    return arrays if mask is None else tuple(None if x is None else x[np.flatnonzero(mask)] for x in arrays)


def mean(losses, weights=None):
    return jnp.mean(losses if weights is None else losses * weights)


def over_views(loss_of_pair, views, temperature):
    """`loss_of_pair(positive [B], negatives [B, V (B - 1)])`, averaged over ordered pairs of views and images."""
    n, count = len(views[0]), len(views)
    others = np.array([[j for j in range(n) if j != i] for i in range(n)])
    z = jnp.stack([unit(x) for x in views])
    losses = [
        loss_of_pair(
            jnp.sum(z[u] * z[v], axis=1) / temperature,
            jnp.einsum("id,vijd->ijv", z[u], z[:, others]).reshape(n, -1) / temperature,
        )
        for u in range(count)
        for v in range(count)
        if u != v
    ]
    return sum(losses) / len(losses)


def nt_xent(*views, temperature, mask=None, weights=None):
    *views, weights = cut(mask, *views, weights)

    def of_pair(positive, negative):
        return logsumexp(jnp.concatenate([negative, positive[:, None]], axis=1), axis=1) - positive

    return mean(over_views(of_pair, views, temperature), weights)


def decoupled(*views, temperature, weights, mask=None):
    *views, weights = cut(mask, *views, weights)

    def of_pair(positive, negative):
        return logsumexp(negative, axis=1) - weights * positive

    return mean(over_views(of_pair, views, temperature))


def mises_fisher(a, b, sigma, mask=None):
    """DCLW's weights; those of masked rows are not used."""
    e = np.exp(np.sum(a / np.linalg.norm(a, axis=1)[:, None] * b / np.linalg.norm(b, axis=1)[:, None], axis=1) / sigma)
    return 2 - e / (e if mask is None else e[mask]).mean()


def debiased(*views, temperature, prior, hardness=0.0, mask=None):
    def of_pair(positive, negative):
        count = negative.shape[1]
        importance = jnp.exp(hardness * negative)
        total = jnp.sum(importance * jnp.exp(negative), axis=1) / importance.mean(axis=1)
        estimate = (total - count * prior * jnp.exp(positive)) / (1 - prior)
        estimate = jnp.maximum(estimate, count * jnp.exp(-1 / temperature))
        return -jnp.log(jnp.exp(positive) / (jnp.exp(positive) + estimate))

    return mean(over_views(of_pair, cut(mask, *views), temperature))


def sup_con(x, ids, temperature, mask=None):
    x, ids = cut(mask, x, ids)
    itself = np.eye(len(x), dtype=bool)
    same = (ids[:, None] == ids[None]) & ~itself
    s = table(x, x) / temperature
    s = log_softmax(jnp.where(itself, -jnp.inf, s), axis=1)
    rows = np.flatnonzero(same.any(axis=1))
    losses = -jnp.where(same, s, 0).sum(axis=1)[rows] / same.sum(axis=1)[rows]
    return jnp.sum(losses) / max(len(rows), 1)


def info_nce(query, key, temperature, negatives=None, margin=0.0, mask=None, weights=None):
    query, key, weights = cut(mask, query, key, weights)
    positive = (jnp.sum(unit(query) * unit(key), axis=1) - margin) / temperature
    s = table(query, key if negatives is None else negatives) / temperature
    if negatives is None:
        s = jnp.where(np.eye(len(s), dtype=bool), -jnp.inf, s)
    return mean(logsumexp(jnp.concatenate([positive[:, None], s], axis=1), axis=1) - positive, weights)


def clip_softmax(image, text, scale, ids=None, margin=0.0, label_smoothing=0.0, mask=None, weights=None):
    image, text, ids, weights = cut(mask, image, text, ids, weights)
    n = len(image)
    ids = np.arange(n) if ids is None else ids
    cosines = table(image, text, scale)
    s = cosines - scale * margin * np.eye(n)
    target = (ids[:, None] == ids[None]).astype(np.float64)
    losses = 0
    for axis in (0, 1):
        # Smoothing spreads over the cosines themselves: the margin belongs to the true target alone.
        positive = jnp.sum(target / target.sum(axis=axis, keepdims=True) * s, axis=axis)
        expected = (1 - label_smoothing) * positive + label_smoothing * cosines.mean(axis=axis)
        losses += (logsumexp(s, axis=axis) - expected) / 2
    return mean(losses, weights)


def sigmoid(image, text, scale, bias, ids=None, mask=None, weights=None):
    image, text, ids, weights = cut(mask, image, text, ids, weights)
    ids = np.arange(len(image)) if ids is None else ids
    z = np.where(ids[:, None] == ids[None], 1, -1)
    return mean(jnp.logaddexp(0, -z * (table(image, text, scale) + bias)).sum(axis=1), weights)


def similarity_distillation(
    image, text, scale, *, teacher_image, teacher_text, teacher_scale=1.0, only_right=False, mask=None
):
    image, text, teacher_image, teacher_text = cut(mask, image, text, teacher_image, teacher_text)
    s, t = table(image, text, scale), table(teacher_image, teacher_text, teacher_scale)
    losses = 0
    for axis in (0, 1):
        p, q = log_softmax(t, axis=axis), log_softmax(s, axis=axis)
        kl = jnp.sum(jnp.exp(p) * (p - q), axis=axis)
        right = jnp.argmax(t, axis=axis) == np.arange(len(t))
        losses += (jnp.where(right, kl, 0) if only_right else kl) / 2
    return mean(losses)
