"""Evaluations as a run makes them, against the same functions on features that were computed by hand."""

import itertools
from dataclasses import dataclass

import cv2
import jax
import numpy as np
import pytest
from small import CONFIGS, quick_compilation, tiny  # noqa: F401

from ssljax.data import Arrays, Scenes, Subset
from ssljax.encode import Encoder, FrozenEncoder, Pixels
from ssljax.evals import Classification, Retrieval, ZeroShot
from ssljax.evals.fewshot import few_shot
from ssljax.evals.knn import knn
from ssljax.evals.linear import linear_probe
from ssljax.mesh import Mesh
from ssljax.run import Run
from ssljax.state import TrainState

COUNT = 50  # no multiple of a batch
TRAIN = Scenes(count=64, split="train", size=16)
TEST = Scenes(count=COUNT, split="test", size=16)


@dataclass(frozen=True)
class Untrained:
    """A tiny CLIP as initialised, its encoder, and what it makes of `TRAIN` and `TEST`, computed by hand."""

    run: Run
    state: TrainState
    encoder: FrozenEncoder
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]

    def by_hand(self, source, names: tuple[str, ...] = ("image", "text")) -> dict[str, np.ndarray]:
        return by_hand(self.run, self.state, source, names)

    def texts(self, texts: list[str]) -> np.ndarray:
        e = self.run.experiment
        tokens = np.stack([e.data.tokenizer(text) for text in texts])
        return np.asarray(e.method.features(self.state.params, self.state.method, {"text": tokens})["text"])


def by_hand(run: Run, state: TrainState, source, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    records = [source[i] for i in range(len(source))]
    batch = {"image": np.stack([record["image"] for record in records])}
    if "text" in names:
        batch["text"] = np.stack([run.experiment.data.tokenizer(record["text"]) for record in records])
    views = run.experiment.data.eval_view(None, jax.device_put(batch))
    found = run.experiment.method.features(state.params, state.method, views)
    labels = {"label": np.array([record["label"] for record in records], np.int32)} if "label" in records[0] else {}
    return {**{name: np.asarray(found[name], np.float32) for name in names}, **labels}


@pytest.fixture(scope="module")
def clip() -> Untrained:
    run = Run(tiny(CONFIGS / "clip.py"), jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        state = run.init()
    encoder = run.encoder().at(state.params, state.method)
    names = ("image", "patches", "text")
    return Untrained(run, state, encoder, by_hand(run, state, TRAIN, names), by_hand(run, state, TEST, names))


# --------------------------------------------------------------------------------------------------------- the encoder


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 7), (1, 64), (8, 16), (8, 3)])
def test_features_depend_neither_on_batch_size_nor_on_devices(clip, devices, batch_size):
    e, names = clip.run.experiment, ("image", "patches", "text")
    mesh = Mesh().create(jax.devices()[:devices])
    encoder = Encoder(e.method, e.data.eval_view, clip.run.eval_transform, mesh, batch_size)
    found = encoder.at(jax.device_get(clip.state.params), jax.device_get(clip.state.method)).features(TEST, names)
    np.testing.assert_array_equal(found["index"], np.arange(COUNT))
    np.testing.assert_array_equal(found["label"], clip.test["label"])
    for name in names:
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], clip.test[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_texts_and_images(clip):
    """More strings than a batch holds, and a number that is no multiple of it."""
    texts = [TEST[i]["text"] for i in range(COUNT)]
    tokenizer = clip.run.experiment.data.tokenizer
    np.testing.assert_allclose(clip.encoder.texts(texts, tokenizer), clip.test["text"], rtol=1e-4, atol=1e-5)
    images = np.stack([TEST[i]["image"] for i in range(COUNT)])
    np.testing.assert_allclose(clip.encoder.images(images)["image"], clip.test["image"], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- the evaluations


def test_classification(clip):
    """All protocols, of the features and of raw pixels."""
    evaluation = Classification(TRAIN, TEST, ("knn", "linear", "fewshot"), k=(1, 5), linear_epochs=2, shots=(1,))

    def expected(train, test) -> dict[str, float]:
        sets = train, clip.train["label"], test, clip.test["label"]
        classes = int(max(sets[1].max(), sets[3].max())) + 1
        return (
            knn(*sets, classes=classes, k=(1, 5), temperature=0.07)
            | linear_probe(*sets, classes=classes, epochs=2)
            | few_shot(*sets, classes=classes, shots=(1,))
        )

    found = evaluation.run(clip.encoder)
    assert found == pytest.approx(expected(clip.train["image"], clip.test["image"]), abs=1e-6)
    assert {name.split("_")[0] for name in found} >= {"knn1", "knn5", "linear"}
    pixels = evaluation.run(clip.run.encoder(Pixels()).at({}, {}))
    flat = [np.stack([record["image"].ravel() for record in source]) / np.float32(255) for source in (TRAIN, TEST)]
    view = clip.run.experiment.data.eval_view.views["image"]
    mean, std = (np.tile(np.float32(x), flat[0].shape[1] // 3) for x in (view.mean, view.std))
    assert pixels == pytest.approx(expected(*[(x - mean) / std for x in flat]), abs=1e-6)
    assert pixels != found


def test_classification_of_another_feature(clip):
    found = Classification(TRAIN, TEST, k=(5,), feature="text").run(clip.encoder)
    sets = clip.train["text"], clip.train["label"], clip.test["text"], clip.test["label"]
    assert found == pytest.approx(knn(*sets, classes=48, k=(5,)))
    with pytest.raises(ValueError, match=r"no features \['audio'\]"):
        Classification(TRAIN, TEST, feature="audio").run(clip.encoder)


def test_zero_shot(clip):
    """Cosines to the mean of the normalised prompts, in float64 numpy."""
    templates, tokenizer = ("a {}", "a picture of a {}"), clip.run.experiment.data.tokenizer
    found = ZeroShot(TEST, tokenizer, templates).run(clip.encoder)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    prompts = clip.texts([t.format(name) for name in TEST.classes for t in templates]).astype(np.float64)
    scores = unit(clip.test["image"].astype(np.float64)) @ unit(unit(prompts).reshape(48, 2, -1).mean(1)).T
    rank = (scores > scores[np.arange(COUNT), clip.test["label"], None]).sum(1)
    assert found == pytest.approx({"zeroshot_top1": np.mean(rank < 1), "zeroshot_top5": np.mean(rank < 5)})
    assert found["zeroshot_top5"] > 0
    renamed = ZeroShot(TEST, tokenizer, templates, classes=TEST.classes[::-1]).run(clip.encoder)
    assert renamed != found
    nameless = Arrays({"image": np.zeros((4, 16, 16, 3), np.uint8), "label": np.arange(4)})
    with pytest.raises(ValueError, match="needs class names"):
        ZeroShot(nameless, tokenizer).run(clip.encoder)


def recalls(a: np.ndarray, b: np.ndarray, same: np.ndarray) -> dict[str, float]:
    """Retrieval by hand: the share of rows of `a` with a `same` row of `b` among the k nearest, and the reverse."""
    a, b = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (a, b))
    result = {}
    for (name, cosine, match), k in itertools.product((("i2t", a @ b.T, same), ("t2i", b @ a.T, same.T)), (1, 5, 10)):
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        result[f"{name}_r{k}"] = float(np.mean(np.take_along_axis(match, order, axis=1).any(axis=1)))
    return result


def test_retrieval_with_duplicate_captions(clip):
    """Any picture with the same caption is a hit: three samples each share a caption here."""
    columns = {"image": [TEST[i]["image"] for i in range(COUNT)], "text": [TEST[i // 3]["text"] for i in range(COUNT)]}
    source = Arrays(columns)
    caption = np.array(columns["text"])
    assert len(set(caption)) < COUNT
    features = clip.by_hand(source)
    same = caption[:, None] == caption
    found = Retrieval(source).run(clip.encoder)
    # Copies of one text have one and the same distance; with any of them as a hit their order does not matter.
    assert found == pytest.approx(recalls(features["image"], features["text"], same))
    assert found != pytest.approx(recalls(features["image"], features["text"], np.eye(COUNT, dtype=bool)))


def test_retrieval_between_two_sources(clip):
    """Two renderings of the same things, matched by their position: a picture and the same one darkened."""
    images = np.stack([TEST[i]["image"] for i in range(COUNT)])
    query, key = Arrays({"image": images}), Arrays({"image": images // 2})
    found = Retrieval(query, key, ("image", "image")).run(clip.encoder)
    features = [clip.by_hand(source, ("image",))["image"] for source in (query, key)]
    assert found == pytest.approx(recalls(*features, np.eye(COUNT, dtype=bool)))
    assert 0 < found["i2t_r1"] < 1
    shifted = Arrays({"image": np.roll(images // 2, 1, axis=0)})
    assert Retrieval(query, shifted, ("image", "image")).run(clip.encoder)["i2t_r1"] < found["i2t_r1"]
    pictures = [cv2.imencode(".png", image[..., ::-1])[1].tobytes() for image in images]  # OpenCV writes BGR
    unreadable = Arrays({"image": [*pictures[:7], b"", *pictures[8:]]})
    left = np.delete(np.arange(COUNT), 7)
    readable = [Arrays({"image": x[left]}) for x in (images, images // 2)]
    left_out = Retrieval(unreadable, key, ("image", "image")).run(clip.encoder)
    assert left_out == Retrieval(*readable, ("image", "image")).run(clip.encoder)
    with pytest.raises(ValueError, match=f"query has {COUNT} and key has 40"):
        Retrieval(query, Subset(key, stop=40), ("image", "image")).run(clip.encoder)
