"""Evaluations of frozen features against scikit-learn, brute-force numpy and closed forms, whatever the chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jax.sharding import AxisType
from jaxtyping import TypeCheckError, jaxtyped
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from ssljax.evals import fewshot, knn, linear, retrieval, zeroshot
from ssljax.evals.chunks import BLOCK
from ssljax.evals.classification import label_rank
from ssljax.evals.collapse import collapse


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def digits():
    """Real pictures of digits: 900 training and 300 test rows of 64 pixels, 10 classes."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[:1200]
    x, y = x[order].astype(np.float32), y[order].astype(np.int32)
    return x[:900], y[:900], x[900:], y[900:]


# k-NN


def test_nearest_is_exact():
    """Over a bank of several blocks, the last of which overlaps the one before."""
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(2 * BLOCK + 100, 8)).astype(np.float32)
    queries = rng.normal(size=(50, 8)).astype(np.float32)
    similarity, index = knn.nearest(bank, queries, 7, chunk=32)
    table = unit(queries) @ unit(bank).T
    np.testing.assert_array_equal(index, np.argsort(-table, axis=1, kind="stable")[:, :7])
    np.testing.assert_allclose(similarity, -np.sort(-table, axis=1)[:, :7], rtol=1e-6)


def test_nearest_ties_keep_the_order_of_the_bank():
    bank = np.zeros((BLOCK + 100, 2), np.float32)
    bank[:, 0] = np.arange(len(bank)) % 100 > 0
    _, index = knn.nearest(bank, bank[1:3], 9000)
    ones = np.flatnonzero(bank[:, 0])
    np.testing.assert_array_equal(index, np.tile(np.r_[ones, np.flatnonzero(bank[:, 0] == 0)][:9000], (2, 1)))


def test_nearest_of_a_small_bank():
    similarity, index = knn.nearest(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), 20)
    assert similarity.shape == index.shape == (3, 3)
    np.testing.assert_array_equal(index[:, 0], np.arange(3))


def test_knn_equals_sklearn(digits):
    def vote(distance):  # of unit vectors: the cosine is 1 - distance^2 / 2
        return np.exp((1 - distance**2 / 2) / 0.07)

    train_x, train_y, test_x, test_y = digits
    got = knn.knn(*digits, classes=10, k=(1, 10, 20), temperature=0.07)
    for k in (1, 10, 20):
        model = KNeighborsClassifier(k, weights=vote, algorithm="brute")  # pyright: ignore[reportArgumentType]
        votes = model.fit(unit(train_x), train_y).predict_proba(unit(test_x))
        own = votes[np.arange(len(test_y)), test_y]
        assert got[f"knn{k}_top1"] == pytest.approx(np.mean(votes.argmax(1) == test_y), abs=1e-6)
        # In the top 5: fewer than five classes with more votes, and at least one vote.
        top5 = ((votes > own[:, None]).sum(1) < 5) & (own > 0)
        assert got[f"knn{k}_top5"] == pytest.approx(np.mean(top5), abs=1e-6)
    assert got["knn1_top1"] > 0.9


def test_knn_does_not_depend_on_chunks(digits):
    train_x, train_y, test_x, test_y = digits
    whole = knn.knn(*digits, classes=10, k=(5, 20))
    assert knn.knn(*digits, classes=10, k=(5, 20), chunk=77) == whole
    shuffled = np.random.default_rng(1).permutation(len(train_x))
    assert knn.knn(train_x[shuffled], train_y[shuffled], test_x, test_y, classes=10, k=(5, 20)) == whole


def test_knn_beyond_the_bank_lets_all_vote():
    x = np.array([[1, 0], [1, 0.1], [0, 1]], np.float32)
    got = knn.knn(x, np.array([0, 1, 1]), x[:1], np.array([0]), classes=2, k=(50,), temperature=10.0)
    assert got == {"knn50_top1": 0.0}  # class 1 has two votes, nearly as heavy as the one of class 0


def test_knn_survives_a_cold_temperature(digits):
    got = knn.knn(*digits, classes=10, k=(20,), temperature=1e-3)
    nearest = knn.knn(*digits, classes=10, k=(1,))
    assert got["knn20_top1"] == pytest.approx(nearest["knn1_top1"], abs=0.01)


def test_knn_memory_does_not_grow_with_the_bank():
    """Temporary memory of a chunk of 1024 queries against a bank of the size of ImageNet, and one a twentieth of it."""

    def memory(size):
        shapes = [((size, 384), jnp.float32), ((size,), jnp.int32), ((1024, 384), jnp.float32), ((1024,), jnp.int32)]
        arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]
        analysis = knn._vote.lower(*arguments, (10, 20), 1000, 0.07).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    large = memory(1_281_167)
    assert large <= 256 * 2**20
    assert large <= 1.01 * memory(64_000)


def test_ties_and_nan_count_against():
    scores = jnp.array([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [jnp.nan, jnp.nan, jnp.nan]])
    np.testing.assert_array_equal(label_rank(scores, jnp.zeros(3, jnp.int32)), [1, 0, 2])


@pytest.mark.parametrize("labels", [[0, 1, 3], [-1, 0, 1]])
def test_labels_must_be_classes(labels):
    x = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"training set: labels run from .* outside 0\.\.2"):
        knn.knn(x, np.array(labels), x, np.arange(3), classes=3)


# Linear probe


def test_linear_probe_is_as_good_as_logistic_regression(digits):
    train_x, train_y, test_x, test_y = digits
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    model = LogisticRegression(C=0.1, max_iter=1000).fit((train_x - mean) / std, train_y)
    reference = model.score((test_x - mean) / std, test_y)
    got = linear.linear_probe(*digits, classes=10, epochs=20)
    assert abs(got["linear_top1"] - reference) < 0.02
    assert got["linear_top5"] >= got["linear_top1"]
    assert got["linear_lr"] in linear.LEARNING_RATES


def test_linear_probe_ignores_the_scale_of_features(digits):
    train_x, train_y, test_x, test_y = digits
    got = [
        linear.linear_probe(s * train_x + s, train_y, s * test_x + s, test_y, classes=10, epochs=5)["linear_top1"]
        for s in (1.0, 1e-4)
    ]
    assert got[0] == pytest.approx(got[1], abs=0.01)
    assert got[0] > 0.9


def test_linear_probe_takes_nesterov_steps():
    """Two steps of one full batch, by hand in float64, from a zero head."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)).astype(np.float32), rng.integers(0, 4, 8).astype(np.int32)
    heads = {"kernel": jnp.zeros((2, 3, 4)), "bias": jnp.zeros((2, 4))}
    order = np.tile(np.arange(8), (2, 1))
    rates, decay = np.array([0.1, 0.7]), np.array([1.0, 0.5])
    scaling = jnp.zeros(3), jnp.ones(3)
    momentum = linear.NESTEROV.init(heads)
    got, _ = linear._epoch(heads, momentum, x, y, scaling, jnp.asarray(rates), order, jnp.asarray(decay))
    for head, rate in enumerate(rates):
        w, v = np.zeros((4, 4)), np.zeros((4, 4))  # the last row is the bias
        x1 = np.concatenate([x, np.ones((8, 1))], axis=1).astype(np.float64)
        for factor in decay:
            p = np.exp(x1 @ w) / np.exp(x1 @ w).sum(1, keepdims=True)
            gradient = x1.T @ (p - np.eye(4)[y]) / 8
            v = 0.9 * v + gradient
            w = w - rate * factor * (gradient + 0.9 * v)
        np.testing.assert_allclose(got["kernel"][head], w[:3], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(got["bias"][head], w[3], rtol=1e-5, atol=1e-7)


def test_linear_probe_never_chooses_on_the_test_set(digits):
    """Wrong test labels change the accuracy, not the choice."""
    train_x, train_y, test_x, test_y = digits
    right = linear.linear_probe(*digits, classes=10, epochs=2)
    wrong = linear.linear_probe(train_x, train_y, test_x, (test_y + 1) % 10, classes=10, epochs=2)
    assert right["linear_lr"] == wrong["linear_lr"]
    assert wrong["linear_top1"] < 0.2 < right["linear_top1"]


# Few shots


def ridge_accuracy(train_x, train_y, test_x, test_y, classes, penalty):
    """scikit-learn's ridge on normalised, centred rows with the documented penalty."""
    x, z = unit(train_x), unit(test_x)
    center = x.mean(0)
    alpha = penalty * np.mean(np.sum((x - center) ** 2, axis=1))
    model = Ridge(alpha=alpha).fit(x - center, np.eye(classes)[train_y])
    return np.mean(model.predict(z - center).argmax(1) == test_y)


@pytest.mark.parametrize("shots", [1, 10])  # 10 rows < 64 features < 100 rows: the dual and the primal solution
def test_few_shot_equals_ridge(digits, shots):
    train_x, train_y, test_x, test_y = digits
    got = fewshot.few_shot(*digits, classes=10, shots=(shots,), draws=3, penalty=0.5)
    want = []
    for draw in range(3):
        rows = fewshot.draw_shots(np.random.default_rng((0, shots, draw)), train_y, shots)
        want.append(ridge_accuracy(train_x[rows], train_y[rows], test_x, test_y, 10, 0.5))
    assert got[f"fewshot{shots}_top1"] == pytest.approx(np.mean(want), abs=2e-3)
    assert got[f"fewshot{shots}_std"] == pytest.approx(np.std(want), abs=2e-3)


def test_draws_are_balanced_and_differ():
    labels = np.array([0] * 50 + [1] * 3 + [3] * 20)
    draws = [fewshot.draw_shots(np.random.default_rng(seed), labels, 5) for seed in range(2)]
    for rows in draws:
        assert len(set(rows)) == len(rows)
        np.testing.assert_array_equal(np.bincount(labels[rows]), [5, 3, 0, 5])  # a class of 3 gives all it has
    assert set(draws[0]) != set(draws[1])


def test_more_shots_are_better(digits):
    got = fewshot.few_shot(*digits, classes=10, shots=(1, 10), draws=3)
    assert 0.3 < got["fewshot1_top1"] < got["fewshot10_top1"] - 0.1


# Zero-shot


def test_class_embeddings_average_unit_prompts():
    table = {"a cat": [3.0, 0, 0], "the cat": [0, 0.2, 0], "a dog": [0, 0, 5.0], "the dog": [0, 0, 1.0]}
    asked = []

    def encode(prompts):
        asked.append(list(prompts))
        return np.array([table[p] for p in prompts])

    got = zeroshot.class_embeddings(encode, ("cat", "dog"), ("a {}", "the {}"))
    assert asked == [["a cat", "the cat", "a dog", "the dog"]]
    np.testing.assert_allclose(got, [[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]], rtol=1e-6)


def test_templates_need_a_place_for_the_name():
    with pytest.raises(ValueError, match=r"\['a photo'\]"):
        zeroshot.class_embeddings(lambda prompts: np.ones((len(prompts), 2)), ("cat",), ("a {}", "a photo"))


def test_zeroshot_equals_brute_force():
    rng = np.random.default_rng(0)
    image, classes = rng.normal(size=(101, 8)).astype(np.float32), rng.normal(size=(12, 8)).astype(np.float32)
    labels = rng.integers(0, 12, 101)
    order = np.argsort(-unit(image) @ unit(classes).T, axis=1)
    for chunk in (16, 1024):
        got = zeroshot.zeroshot(image, labels, classes, chunk=chunk)
        assert got["zeroshot_top1"] == pytest.approx(np.mean(order[:, 0] == labels))
        assert got["zeroshot_top5"] == pytest.approx(np.mean((order[:, :5] == labels[:, None]).any(1)))


# Retrieval


def brute_recall(queries, gallery, query_id, gallery_id, k):
    order = np.argsort(-unit(queries) @ unit(gallery).T, axis=1)[:, :k]
    return np.mean((gallery_id[order] == query_id[:, None]).any(1))


@pytest.mark.parametrize("captions", [5, BLOCK // 40 + 1])  # texts in one block, and in two
def test_retrieval_equals_brute_force_with_several_captions(captions):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(40, 8)).astype(np.float32)
    text_id = rng.permutation(np.repeat(np.arange(40), captions))
    text = (image[text_id] + 1.5 * rng.normal(size=(len(text_id), 8))).astype(np.float32)
    names = np.array([f"picture {i}" for i in range(40)])  # ids may be strings
    for chunk in (27, 4096):
        got = retrieval.retrieval(image, text, image_id=names, text_id=names[text_id], chunk=chunk)
        for k in (1, 5, 10):
            assert got[f"i2t_r{k}"] == pytest.approx(brute_recall(image, text, np.arange(40), text_id, k))
            assert got[f"t2i_r{k}"] == pytest.approx(brute_recall(text, image, text_id, np.arange(40), k))
    assert 0.1 < got["t2i_r1"] < got["t2i_r10"] < 1


def test_retrieval_of_a_collapsed_model_is_no_luck():
    same, ids = np.ones((20, 4), np.float32), np.arange(20)
    got = retrieval.retrieval(same, same, image_id=ids, text_id=ids)
    assert set(got.values()) == {0.0}


def test_retrieval_needs_matches():
    x = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="1 image id"):
        retrieval.retrieval(x, x[:2], image_id=np.arange(3), text_id=np.arange(2))


# Collapse

diagnose = jax.jit(collapse)


def test_collapse_of_known_batches():
    rng = np.random.default_rng(0)
    sphere = rng.normal(size=(512, 32)).astype(np.float32)
    got = diagnose(sphere)
    assert got["std"] == pytest.approx(1, abs=0.01)
    assert got["negative"] == pytest.approx(0, abs=0.01)
    assert got["rank"] == pytest.approx(32, rel=0.03)

    point = np.tile(sphere[:1], (64, 1))
    got = diagnose(point, point)
    want = {"std": 0, "rank": 1, "uniformity": 0, "negative": 1, "positive": 1, "alignment": 0}
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-5), name

    plane = rng.normal(size=(64, 3)) @ np.linalg.qr(rng.normal(size=(32, 3)))[0].T
    assert diagnose(plane.astype(np.float32))["rank"] < 3.001


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_collapse_equals_float64(shape):
    rng = np.random.default_rng(0)
    a = rng.normal(size=shape) @ np.diag(np.geomspace(1, 0.1, shape[1]))
    b = a + 0.1 * rng.normal(size=shape)
    a, b = a.astype(np.float32), b.astype(np.float32)
    u, v = unit(a), unit(b)
    off = ~np.eye(len(a), dtype=bool)
    p = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    p /= p.sum()
    want = {
        "std": u.std(axis=0).mean() * shape[1] ** 0.5,
        "rank": np.exp(-(p * np.log(p)).sum()),
        "uniformity": np.log(np.exp(-2 * ((u[:, None] - u) ** 2).sum(-1))[off].mean()),
        "negative": (u @ v.T)[off].mean(),
        "positive": np.diag(u @ v.T).mean(),
        "alignment": ((u - v) ** 2).sum(1).mean(),
    }
    got = diagnose(a, b)
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("batch", [np.zeros((4, 8)), np.ones((1, 8)), 1e20 * np.ones((4, 8)), 1e-20 * np.eye(4)])
def test_collapse_is_finite(batch):
    a = batch.astype(np.float32)
    got = diagnose(a, a)
    assert all(np.isfinite(x) for x in got.values()), got
    assert 1 - 1e-5 <= got["rank"] <= min(a.shape) + 1e-5


# All


def all_evaluations(train_x, train_y, test_x, test_y):
    return {
        **knn.knn(train_x, train_y, test_x, test_y, classes=10),
        **linear.linear_probe(train_x, train_y, test_x, test_y, classes=10, epochs=2, learning_rates=(0.1,)),
        **fewshot.few_shot(train_x, train_y, test_x, test_y, classes=10, shots=(5,), draws=2),
        **zeroshot.zeroshot(test_x, test_y, train_x[:10]),
        **retrieval.retrieval(test_x, test_x + 1, image_id=np.arange(len(test_x)), text_id=np.arange(len(test_x))),
    }


def test_evaluations_run_inside_the_training_loop(digits):
    """Under the loop's transfer guard and mesh they give plain floats, the same as outside."""
    small = tuple(x[:200] for x in digits)
    outside = all_evaluations(*small)
    assert all(type(v) is float for v in outside.values())
    mesh = jax.make_mesh((4, 2, 1), ("replica", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        inside = all_evaluations(*small)
    assert inside == pytest.approx(outside, abs=0.02)


def test_annotations_hold(digits):
    functions = {"knn": knn.knn, "linear": linear.linear_probe, "fewshot": fewshot.few_shot}
    train_x, train_y, test_x, test_y = (x[:50] for x in digits)
    for fn in functions.values():
        with pytest.raises(TypeCheckError):
            jaxtyped(fn, typechecker=beartype)(train_x, train_y, test_x[:, 1:], test_y, classes=10)
    assert jaxtyped(knn.knn, typechecker=beartype)(train_x, train_y, test_x, test_y, classes=10)
    assert len(jaxtyped(knn.nearest, typechecker=beartype)(train_x, test_x, 3)) == 2
    assert jaxtyped(zeroshot.zeroshot, typechecker=beartype)(test_x, test_y, jnp.asarray(train_x[:10]))
    ids = np.arange(50)
    assert jaxtyped(retrieval.retrieval, typechecker=beartype)(test_x, test_x, image_id=ids, text_id=ids)
    assert jax.jit(jaxtyped(collapse, typechecker=beartype))(jnp.asarray(test_x), jnp.asarray(test_x))
