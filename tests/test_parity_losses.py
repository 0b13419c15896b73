"""Losses against PyTorch: values and gradients of formulas stated there, and of the libraries people use.

transformers' CLIP and SigLIP, open_clip's ClipLoss and SigLipLoss, pytorch_metric_learning's NTXentLoss and SupConLoss
and lightly's decoupled losses, each where it is installed.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax import losses

torch = pytest.importorskip("torch", reason="parity with PyTorch needs `pip install ssljax[parity]`")


def pairs(seed, n, d=16):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, d))
    # Enough noise to confuse pairs: a loss near 0 is a difference of equal logits, whose rounding float32 cannot undo.
    return a.astype(np.float32), (a + 3 * rng.normal(size=(n, d))).astype(np.float32)


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def compare(ours, theirs, arrays, scalars):
    """Value and all gradients; PyTorch in float64."""
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (*arrays, *scalars)]
    reference = theirs(*tensors)
    reference.backward()
    arguments = [jnp.asarray(x, jnp.float32) for x in (*arrays, *scalars)]
    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=tuple(range(len(arguments)))))(*arguments)
    close(value, reference)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        close(gradient, tensor.grad)


def torch_nt_xent(a, b, temperature):
    """Each of 2B rows classifies its partner among the 2B - 1 others (what lightly's NTXentLoss computes)."""
    z = torch.nn.functional.normalize(torch.cat([a, b]), dim=1)
    n = len(a)
    others = ~torch.eye(2 * n, dtype=torch.bool)
    logits = (z @ z.T / temperature)[others].view(2 * n, 2 * n - 1)
    labels = torch.cat([torch.arange(n) + n - 1, torch.arange(n)])
    return torch.nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("n", [2, 33])
def test_nt_xent(n, temperature):
    compare(lambda a, b, t: losses.nt_xent(a, b, temperature=t), torch_nt_xent, pairs(0, n), [temperature])


def test_queue():
    def theirs(query, key, temperature, queue):
        query, key, queue = (torch.nn.functional.normalize(x, dim=1) for x in (query, key, queue))
        logits = torch.cat([torch.einsum("nc,nc->n", query, key)[:, None], query @ queue.T], dim=1) / temperature
        return torch.nn.functional.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))

    def ours(query, key, queue, temperature):
        return losses.info_nce(query, key, temperature, queue)

    queue = pairs(1, 50)[0]
    compare(ours, lambda q, k, n, t: theirs(q, k, t, n), [*pairs(0, 9), queue], [0.2])


def tiny(kind):
    """A CLIP or SigLIP of transformers with random weights, and what it makes of a batch of five."""
    transformers = pytest.importorskip("transformers", reason="parity with CLIP and SigLIP needs transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 8, "projection_size": 16}
    special = {"bos_token_id": 0, "eos_token_id": 49, "pad_token_id": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    config_class, model_class = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}Model")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers
        model = model_class(config_class(text_config={**text, **special}, vision_config=vision)).double().eval()
        ids = torch.randint(2, 49, (5, 8))
        ids[:, -1] = 49
        out = model(input_ids=ids, pixel_values=torch.randn(5, 3, 16, 16, dtype=torch.float64), return_loss=True)
    out.image_embeds.retain_grad()
    out.text_embeds.retain_grad()
    return model, out


def tangent(gradient, x):
    """The part of a gradient that survives the normalisation of x, which is a unit vector already."""
    return gradient - (gradient * x).sum(dim=1, keepdim=True) * x


def embeddings(out):
    return [jnp.asarray(x.detach().numpy(), jnp.float32) for x in (out.image_embeds, out.text_embeds)]


def test_clip_softmax_equals_transformers():
    model, out = tiny("clip")
    out.loss.backward()
    log_scale = jnp.float32(model.logit_scale.item())

    def ours(image, text, s):
        return losses.clip_softmax(image, text, jnp.exp(s))

    value, gradients = jax.value_and_grad(ours, argnums=(0, 1, 2))(*embeddings(out), log_scale)
    close(value, out.loss)
    close(gradients[0], tangent(out.image_embeds.grad, out.image_embeds))
    close(gradients[1], tangent(out.text_embeds.grad, out.text_embeds))
    close(gradients[2], model.logit_scale.grad)


def test_sigmoid_equals_transformers():
    model, out = tiny("siglip")
    log_scale, bias = jnp.float32(model.logit_scale.item()), jnp.float32(model.logit_bias.item())
    out.loss.backward()

    def ours(image, text, s, b):
        return losses.sigmoid(image, text, jnp.exp(s), b)

    value, gradients = jax.value_and_grad(ours, argnums=(0, 1, 2, 3))(*embeddings(out), log_scale, bias)
    close(value, out.loss)
    close(gradients[0], tangent(out.image_embeds.grad, out.image_embeds))
    close(gradients[1], tangent(out.text_embeds.grad, out.text_embeds))
    close(gradients[2], model.logit_scale.grad[0])
    close(gradients[3], model.logit_bias.grad[0])


def torch_sigmoid(image, text, scale, bias):
    image, text = torch.nn.functional.normalize(image), torch.nn.functional.normalize(text)
    logits = image @ text.T * scale + bias
    return -torch.nn.functional.logsigmoid((2 * torch.eye(len(image)) - 1) * logits).sum() / len(image)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (10.0, -2.71), (118.0, -12.7)])
def test_sigmoid(scale, bias):
    """The published start, the small-batch start, and a released model's learned values."""
    compare(losses.sigmoid, torch_sigmoid, pairs(2, 17), [scale, bias])


def torch_clip(image, text, scale):
    logits = scale * torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
    labels = torch.arange(len(image))
    return (torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)) / 2


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_clip_softmax(scale):
    compare(losses.clip_softmax, torch_clip, pairs(3, 17), [scale])


def unit(x):
    return torch.nn.functional.normalize(x, dim=1)


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_clip_softmax_equals_open_clip(scale):
    theirs = pytest.importorskip("open_clip.loss", reason="needs open_clip_torch").ClipLoss()
    compare(losses.clip_softmax, lambda i, t, s: theirs(unit(i), unit(t), s), pairs(4, 33), [scale])


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (118.0, -12.7)])
def test_sigmoid_equals_open_clip(scale, bias):
    theirs = pytest.importorskip("open_clip.loss", reason="needs open_clip_torch").SigLipLoss()
    compare(losses.sigmoid, lambda i, t, s, b: theirs(unit(i), unit(t), s, b), pairs(4, 33), [scale, bias])


def metric_learning():
    return pytest.importorskip("pytorch_metric_learning.losses", reason="needs pytorch_metric_learning")


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent_equals_pytorch_metric_learning(views, temperature):
    theirs = metric_learning().NTXentLoss(temperature)
    arrays = [*pairs(5, 17), pairs(6, 17)[1]][:views]
    labels = torch.arange(17).repeat(views)
    compare(
        lambda *x: losses.nt_xent(*x, temperature=temperature),
        lambda *x: theirs(torch.cat(x), labels),
        arrays,
        [],
    )


def test_sup_con_equals_pytorch_metric_learning():
    """Whose mean is over anchors with a positive, like ours."""
    theirs = metric_learning().SupConLoss(0.1)
    ids = np.random.default_rng(0).integers(0, 9, 40)
    ids[:2] = 90, 91  # nobody else's
    compare(
        lambda x: losses.sup_con(x, jnp.asarray(ids), 0.1), lambda x: theirs(x, torch.tensor(ids)), pairs(7, 40)[:1], []
    )


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_decoupled_equals_lightly(sigma):
    """lightly's is one direction's mean at a time, then half of both."""
    theirs = pytest.importorskip("lightly.loss", reason="needs lightly")
    loss = theirs.DCLLoss(temperature=0.1) if sigma is None else theirs.DCLWLoss(temperature=0.1, sigma=sigma)
    compare(
        lambda a, b: losses.decoupled(a, b, temperature=0.1, sigma=sigma), lambda a, b: loss(a, b), pairs(8, 19), []
    )
