"""Losses over prototypes and batch statistics against PyTorch in float64: formulas stated here, and lightly."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax import losses

torch = pytest.importorskip("torch", reason="parity with PyTorch needs `pip install ssljax[parity]`")
F = torch.nn.functional

B, K, D, T, V, N = 12, 40, 16, 2, 6, 5


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def double(x):
    return torch.tensor(x, dtype=torch.float64)


TEACHER, PATCHES, CENTRE, QUEUE = normal(0, T, B, K), normal(1, B, N, K), 0.3 * normal(2, K), normal(3, 30, K)
MASK = np.random.default_rng(4).random((B, N)) < 0.5
MASK[3] = False  # an image without masked patches


def swav(student):
    return losses.swapped_cross_entropy(jnp.stack([losses.sinkhorn(s, 0.5) for s in student[:T]]), student, 0.1)


def dino(student):
    return losses.swapped_cross_entropy(losses.centred_softmax(TEACHER, CENTRE, 0.07), student, 0.1)


def ibot(student):
    return losses.masked_cross_entropy(losses.centred_softmax(PATCHES, CENTRE, 0.07), student, 0.1, MASK)


OURS = {
    "swav": (swav, normal(5, V, B, K)),
    "dino": (dino, normal(5, V, B, K)),
    "ibot": (ibot, normal(6, B, N, K)),
    "koleo": (losses.koleo, 1 + normal(7, B, D)),
    "barlow_twins": (losses.barlow_twins, normal(7, B, D), 2 * normal(8, B, D)),
    "vicreg": (losses.vicreg, 0.4 * normal(7, B, D), 0.8 * normal(8, B, D)),
}


def compare(name, theirs):
    """Value and all gradients, to 1e-5."""
    ours, *arrays = OURS[name]
    tensors = [double(x).requires_grad_() for x in arrays]
    reference = theirs(*tensors).squeeze()
    reference.backward()
    value, gradients = jax.jit(jax.value_and_grad(ours, tuple(range(len(arrays)))))(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(value, reference.detach().numpy(), rtol=1e-5)
    for got, tensor in zip(gradients, tensors, strict=True):
        want = tensor.grad.numpy()
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def stated_sinkhorn(scores, epsilon, iterations):
    """Prototypes in rows, as the papers have it: rows to sums of 1 / K, then columns to 1 / B."""
    q = torch.exp(scores.detach() / epsilon).T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def stated_swav(student):
    loss = 0
    for i in range(T):
        code = stated_sinkhorn(student[i], 0.5, 3)
        loss = loss + sum(F.cross_entropy(student[v] / 0.1, code) for v in range(V) if v != i) / (V - 1)
    return loss / T


def stated_dino(student):
    """As DINOv2 counts: local crops against both teachers, global crops together against the teachers exchanged."""
    target = F.softmax(double(TEACHER - CENTRE) / 0.07, dim=-1)
    local = sum(F.cross_entropy(student[v] / 0.1, target[t]) for v in range(T, V) for t in range(T))
    crossed = F.cross_entropy(student[:T].flatten(0, 1) / 0.1, target.flip(0).flatten(0, 1))
    return (local + 2 * crossed) / (T * (V - T) + 2)


def stated_ibot(student):
    """Masked patches packed into rows, with weights; the sum over all images."""
    mask = torch.tensor(MASK)
    weight = (1 / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand(B, N)[mask]
    target = F.softmax(double(PATCHES - CENTRE)[mask] / 0.07, dim=-1)
    return (weight * F.cross_entropy(student[mask] / 0.1, target, reduction="none")).sum() / B


def stated_koleo(x):
    z = F.normalize(x, dim=-1)
    nearest = (z @ z.T - 3 * torch.eye(B)).argmax(dim=1)
    return -torch.log(F.pairwise_distance(z, z[nearest], eps=1e-8) + 1e-8).mean()


def off_diagonal(c):
    return (c**2).sum() - (torch.diagonal(c) ** 2).sum()


def stated_barlow_twins(a, b):
    normalise = torch.nn.BatchNorm1d(D, affine=False, dtype=torch.float64)
    c = normalise(a).T @ normalise(b) / B
    return ((1 - torch.diagonal(c)) ** 2).sum() + 5e-3 * off_diagonal(c)


def stated_vicreg(a, b):
    spread = sum(F.relu(1 - torch.sqrt(x.var(dim=0) + 1e-4)).mean() for x in (a, b)) / 2
    return 25 * F.mse_loss(a, b) + 25 * spread + sum(off_diagonal(torch.cov(x.T)) / D for x in (a, b))


@pytest.mark.parametrize("name", OURS)
def test_stated(name):
    compare(name, globals()[f"stated_{name}"])


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.04, 3), (0.03, 10)])
def test_sinkhorn(epsilon, iterations):
    """At the published temperatures, where float32 holds a score / epsilon of 100 to 1e-5."""
    scores, queue = TEACHER[0], QUEUE
    alone = stated_sinkhorn(double(scores), epsilon, iterations)
    queued = stated_sinkhorn(double(np.concatenate([queue, scores])), epsilon, iterations)[-B:]
    ours = jax.jit(losses.sinkhorn, static_argnums=2)
    np.testing.assert_allclose(ours(scores, epsilon, iterations), alone, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(ours(scores, epsilon, iterations, None, queue), queued, rtol=1e-4, atol=1e-9)


def lightly_swav(theirs, student):
    return theirs.SwaVLoss(sinkhorn_epsilon=0.5)(list(student[:T]), list(student[T:]))


def lightly_dino(theirs, student):
    loss = theirs.DINOLoss(output_dim=K)
    loss.center = double(CENTRE)
    return loss(list(double(TEACHER)), list(student), teacher_temp=0.07)


def lightly_ibot(theirs, student):
    loss = theirs.IBOTPatchLoss(output_dim=K)
    loss.center.center = double(CENTRE)[None]
    mask = torch.tensor(MASK)
    return loss(double(PATCHES)[mask], student[mask], mask[:, None], teacher_temp=0.07)


def lightly_koleo(theirs, x):
    return theirs.KoLeoLoss()(x)


def lightly_barlow_twins(theirs, a, b):
    return theirs.BarlowTwinsLoss()(a, b)


def lightly_vicreg(theirs, a, b):
    return theirs.VICRegLoss()(a, b)


@pytest.mark.parametrize("name", OURS)
def test_lightly(name):
    pytest.importorskip("lightly", reason="parity with lightly needs `pip install lightly`")
    theirs = importlib.import_module("lightly.loss")
    compare(name, lambda *tensors: globals()[f"lightly_{name}"](theirs, *tensors))
