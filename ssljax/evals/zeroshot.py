"""Zero-shot classification: an image takes the class whose prompts' embedding is nearest."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from einops import reduce
from jaxtyping import Array, Float, Int

from ssljax.evals.chunks import map_chunks, place
from ssljax.evals.classification import accuracies, check_labelled, label_rank
from ssljax.losses import dots, l2_normalize

# A small, general set. CLIP's published ImageNet figures take 80 templates and curated class names: pass your own then.
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "a bad photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a drawing of a {}.",
)


def class_embeddings(
    encode_text: Callable[[Sequence[str]], np.ndarray | Array],
    classes: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> Float[np.ndarray, "classes d"]:
    """One unit vector per class: its prompts' embeddings, each l2-normalised, averaged and normalised again.

    This is CLIP's prompt ensembling (Radford et al., 2021, sec. 3.1.4).

    `encode_text` turns prompts into embeddings [prompts, d]. It is called once, with the prompts of all classes, and
    should batch them itself. A template holds `{}` where the class's name goes.
    """
    wrong = [t for t in templates if t.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(f"templates must each contain {{}} once, where the class's name goes; got {wrong or 'none'}")
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    embeddings = _unit(np.asarray(jax.device_get(encode_text(prompts)), np.float32))
    return _unit(reduce(embeddings, "(classes templates) d -> classes d", "mean", classes=len(classes)))


def zeroshot(
    image_x: Float[np.ndarray | Array, "n d"],
    labels: Int[np.ndarray | Array, " n"],
    class_x: Float[np.ndarray | Array, "classes d"],
    *,
    chunk: int = 1024,
) -> dict[str, float]:
    """Accuracy of taking the class with the largest cosine: `zeroshot_top1`, from five classes on `zeroshot_top5`."""
    check_labelled("zero-shot", image_x, labels, len(class_x))
    prompts = place(class_x)
    ranks = map_chunks(partial(_ranks, prompts), image_x, labels, chunk=chunk)
    return accuracies("zeroshot", ranks, len(class_x))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


@jax.jit
def _ranks(prompts: Array, x: Array, y: Array) -> Int[Array, " b"]:
    return label_rank(dots(l2_normalize(x), l2_normalize(prompts)), y)
