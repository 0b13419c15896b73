"""Evaluations as configs: which sources to embed and what to measure, during a run and from a checkpoint alike."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np

from ssljax.data import Source, Tokenizer
from ssljax.evals.fewshot import few_shot
from ssljax.evals.knn import knn
from ssljax.evals.linear import linear_probe
from ssljax.evals.retrieval import retrieval
from ssljax.evals.zeroshot import TEMPLATES, class_embeddings, zeroshot

if TYPE_CHECKING:
    from ssljax.encode import FrozenEncoder


@runtime_checkable
class Evaluation(Protocol):
    """Measures a frozen encoder."""

    def run(self, encoder: "FrozenEncoder") -> dict[str, float]:
        """Metrics by name; accuracies and recalls are shares between 0 and 1."""
        ...


@dataclass(frozen=True)
class Classification:
    """k-NN, a linear probe and few-shot classification of frozen features of a labelled source."""

    train: Source
    test: Source
    protocols: tuple[Literal["knn", "linear", "fewshot"], ...] = ("knn",)
    feature: str = "image"
    k: tuple[int, ...] = (20,)
    temperature: float = 0.07  # of the k-NN votes
    linear_epochs: int = 50
    shots: tuple[int, ...] = (1, 5, 10)

    def run(self, encoder: "FrozenEncoder") -> dict[str, float]:
        train, test = (
            self._embed(encoder, source, name) for source, name in ((self.train, "train"), (self.test, "test"))
        )
        classes = int(max(train[1].max(), test[1].max())) + 1
        result: dict[str, float] = {}
        if "knn" in self.protocols:
            result |= knn(*train, *test, classes=classes, k=self.k, temperature=self.temperature)
        if "linear" in self.protocols:
            result |= linear_probe(*train, *test, classes=classes, epochs=self.linear_epochs)
        if "fewshot" in self.protocols:
            result |= few_shot(*train, *test, classes=classes, shots=self.shots)
        return result

    def _embed(self, encoder: "FrozenEncoder", source: Source, name: str) -> tuple[np.ndarray, np.ndarray]:
        found = encoder.features(source, (self.feature,))
        if "label" not in found:
            raise ValueError(f"classification needs labels, and the samples of its {name} source {source!r} have none")
        return found[self.feature], found["label"]


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot classification: the class whose averaged prompt embedding is nearest to the image."""

    test: Source  # labelled
    tokenizer: Tokenizer
    templates: tuple[str, ...] = TEMPLATES
    classes: tuple[str, ...] | None = None  # names in label order; None: the source's own

    def run(self, encoder: "FrozenEncoder") -> dict[str, float]:
        names = self.classes or tuple(self.test.classes)
        if not names:
            raise ValueError(f"zero-shot classification needs class names: {self.test!r} has none; set `classes`")
        found = encoder.features(self.test)
        prompts = class_embeddings(lambda texts: encoder.texts(texts, self.tokenizer), names, self.templates)
        return zeroshot(found["image"], found["label"], prompts)


@dataclass(frozen=True)
class Retrieval:
    """R@1, 5, 10 between two features of the same samples: image and caption, or two renderings of one thing.

    `query` and `key` must list corresponding samples in the same order; without `key` both features come from `query`.
    A hit is any sample that is the same: samples with one and the same caption count as one.
    """

    query: Source
    key: Source | None = None
    features: tuple[str, str] = ("image", "text")

    def run(self, encoder: "FrozenEncoder") -> dict[str, float]:
        if self.key is None:
            found = encoder.features(self.query, self.features)
            same = np.unique(found["tokens"], axis=0, return_inverse=True)[1] if "tokens" in found else found["index"]
            a, b, a_id, b_id = found[self.features[0]], found[self.features[1]], same, same
        else:
            if len(self.query) != len(self.key):
                raise ValueError(
                    f"retrieval between two sources matches their samples by position, but query has {len(self.query)} "
                    f"and key has {len(self.key)}"
                )
            query, key = encoder.features(self.query, self.features[:1]), encoder.features(self.key, self.features[1:])
            # Pictures that cannot be read are missing from one side.
            same, rows, columns = np.intersect1d(query["index"], key["index"], return_indices=True)
            a, b, a_id, b_id = query[self.features[0]][rows], key[self.features[1]][columns], same, same
        return retrieval(a, b, image_id=a_id, text_id=b_id)
