"""The order of samples: mixtures, balanced classes, repeats; counted by hand, anywhere in the stream."""

import json
from collections import Counter
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
from small import quick_compilation as quick_compilation
from small import simclr_config

from ssljax.checkpoint import CheckpointStore
from ssljax.config import ConfigError, experiment
from ssljax.data import Arrays, BadSample, Concat, Loader, Sampling, train_batches
from ssljax.data.order import BLOCK, Order
from ssljax.data.shuffle import shuffled
from ssljax.state import Progress
from ssljax.train import train

INLINE = Loader(threads=0)


def sources(*sizes):
    return Concat(tuple(Arrays({"value": np.arange(n) + 1_000 * k}) for k, n in enumerate(sizes)))


def owners(index, sizes):
    return np.searchsorted(np.cumsum(sizes), index, side="right")


def assert_epochs(index, visit):
    """Each sample came once before any came twice, and so on; visits count."""
    seen = Counter()
    for i, v in zip(index.tolist(), visit.tolist(), strict=True):
        assert v == seen[i]
        seen[i] += 1
    assert max(seen.values()) - min(seen.values()) <= 1


def test_without_a_word_every_epoch_is_a_permutation():
    order, position = Sampling().order(sources(7, 30), seed=5), np.arange(100)
    draws = order(position)
    np.testing.assert_array_equal(draws.index, shuffled(position, 37, 5))
    np.testing.assert_array_equal(draws.visit, position // 37)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.3, 0.2), (8.0, 0.0, 1.0), (1e-9, 1.0, 2.0)])
def test_weights_hold_in_every_block(weights):
    sizes = (11, 400, 70)
    draws = Sampling(weights=weights).order(sources(*sizes), seed=1)(np.arange(12 * BLOCK))
    group = owners(draws.index, sizes)
    np.testing.assert_array_equal(group, draws.group)
    shares = np.bincount(group, minlength=3) / len(group)
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), atol=1 / BLOCK)
    assert (shares[np.array(weights) > 0] > 0).all()
    blocks = [tuple(np.bincount(group[i : i + BLOCK], minlength=3)) for i in range(0, len(group), BLOCK)]
    if len(set(weights)) > 1:
        assert len(set(blocks)) == 1
    firsts = group.reshape(12, BLOCK)[:, :50]
    assert len(np.unique(firsts, axis=0)) == 12  # shuffled anew in each block
    for k in np.flatnonzero(weights):
        assert_epochs(draws.index[group == k], draws.visit[group == k])


def test_any_part_of_the_stream_alone():
    order = Sampling(weights=(3.0, 1.0), repeats=2).order(sources(50, 9), seed=2)
    whole = order(np.arange(9_000))
    for rows in (np.array([0]), np.array([8_999, 17, 4_000]), np.arange(5_000, 5_100)):
        for some, all_ in zip(order(rows), whole, strict=True):
            np.testing.assert_array_equal(some, all_[rows])
    far = 2**40 + np.arange(2 * BLOCK)
    shares = np.bincount(order(far).group) / len(far)
    np.testing.assert_allclose(shares, (0.75, 0.25), atol=0.01)


@pytest.mark.parametrize("changes", [(1_000,), (1, 2, 3), (BLOCK, 5_000), (700, 700)])
def test_weights_may_change_and_a_source_may_come_in(changes):
    sizes, sampling = (40, 300, 25), Sampling(weights=(1.0, 3.0))
    history = sampling.continued((), 0)
    assert history == [(0, [1.0, 3.0])]
    assert sampling.continued(history, 500) == history
    before = sampling.order(sources(*sizes[:2]), 3)(np.arange(changes[0]))
    for change, weights in zip(changes, [(1.0, 1.0, 2.0), (5.0, 0.0, 1.0), (1.0, 1.0, 1.0)], strict=False):
        sampling = Sampling(weights=weights)
        history = sampling.continued(json.loads(json.dumps(history)), change)
    assert [start for start, _ in history] == sorted({0, *changes})
    draws = sampling.order(sources(*sizes), 3, history)(np.arange(9_000))
    for new, old in zip(draws, before, strict=True):
        np.testing.assert_array_equal(new[: changes[0]], old)
    for (start, weights), (stop, _) in pairwise([*history, (9_000, [])]):
        shares = np.bincount(draws.group[start:stop], minlength=3) / max(1, stop - start)
        expected = np.pad(np.array(weights), (0, 3 - len(weights))) / sum(weights)
        np.testing.assert_allclose(shares, expected, atol=0.04 + 1.5 / max(1, stop - start))
    for k in range(3):  # nothing is lost and nothing comes twice across a change
        assert_epochs(draws.index[draws.group == k], draws.visit[draws.group == k])


def labelled(counts, unlabelled=0):
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(0).permutation(np.concatenate([labels, np.full(unlabelled, -1)]))
    return Arrays({"value": np.arange(len(labels)), "label": labels.astype(np.int32)})


def test_balanced_classes_take_turns():
    source = labelled((3, 0, 90, 17), unlabelled=10)
    draws = Sampling(balance=1.0).order(source, 4)(np.arange(600))
    label = source.labels[draws.index]
    assert {tuple(sorted(turn)) for turn in label.reshape(-1, 3).tolist()} == {(0, 2, 3)}
    for k in (0, 2, 3):
        assert_epochs(draws.index[label == k], draws.visit[label == k])


@pytest.mark.parametrize("balance", [0.5, 0.9])
def test_partly_balanced_classes_follow_the_power(balance):
    counts = np.array([10, 1_000, 100])
    source = labelled(counts)
    label = source.labels[Sampling(balance=balance).order(source, 4)(np.arange(4 * BLOCK)).index]
    expected = counts ** (1 - balance)
    np.testing.assert_allclose(np.bincount(label) / len(label), expected / expected.sum(), atol=1 / BLOCK)


def test_repeats_are_drawn_anew():
    def transform(record, rng):
        return {"value": np.asarray(record["value"]), "draw": np.asarray(rng.random())}

    source, sampling = sources(10), Sampling(repeats=3)
    batches = train_batches(
        source, transform, batch_size=12, seed=0, steps=5, order=sampling.order(source, 0), loader=INLINE
    )
    found = [(batch["index"], batch["draw"]) for batch in batches]
    index, draw = (np.concatenate(column) for column in zip(*found, strict=True))
    np.testing.assert_array_equal(index.reshape(-1, 3), np.repeat(shuffled(np.arange(20), 10, 0), 3).reshape(-1, 3))
    assert len(np.unique(draw)) == 60


def test_a_bad_record_is_replaced_by_one_of_its_source():
    class Broken(Arrays):
        def __getitem__(self, index):
            if index % 2:
                raise BadSample("odd")
            return super().__getitem__(index)

    parts = (Broken({"value": np.arange(20)}), Arrays({"value": np.arange(100, 400)}))
    source, sampling = Concat(parts), Sampling(weights=(1.0, 4.0))
    order = sampling.order(source, 0)
    batches = train_batches(
        source,
        lambda record, rng: {"value": np.asarray(record["value"])},
        batch_size=BLOCK,
        seed=0,
        steps=1,
        order=order,
        loader=INLINE,
    )
    value = next(batches)["value"]
    np.testing.assert_array_equal(value >= 100, order(np.arange(BLOCK)).group == 1)


def test_an_epoch_costs_the_same_anywhere_and_with_many_groups():
    sizes = np.full(20_000, 37)
    order = Order(sizes, None, [(0, [1.0] * len(sizes))])
    first = order(np.arange(len(sizes)))
    np.testing.assert_array_equal(np.sort(first.group), np.arange(len(sizes)))
    assert order(np.array([2**50])).index < sizes.sum()


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"balance": 1.5}, "balance is between 0"),
        ({"weights": (0.0, 0.0)}, "weights must be numbers of at least 0, one of them above"),
        ({"weights": (1.0, float("nan"))}, "weights must be numbers"),
        ({"weights": (1.0, -2.0)}, "weights must be numbers"),
        ({"weights": (1.0, 1.0), "balance": 1.0}, "exclude each other"),
    ],
)
def test_what_makes_no_sense_is_said(sampling, says):
    with pytest.raises(ValueError, match=says):
        Sampling(**sampling)


def test_a_source_that_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"has 3 values, one for each source of a Concat; data.train is a Concat of 2"):
        Sampling(weights=(1.0, 1.0, 1.0)).order(sources(3, 4), 0)
    with pytest.raises(ValueError, match=r"data.train is an? Arrays"):
        Sampling(weights=(1.0,)).order(Arrays({"value": np.arange(3)}), 0)
    with pytest.raises(ValueError, match="needs the labels in advance"):
        Sampling(balance=1.0).order(Concat((labelled((3, 3)),), labelled=False), 0)
    with pytest.raises(ValueError, match="no sample has a label"):
        Sampling(balance=1.0).order(labelled((), unlabelled=4), 0)
    with pytest.raises(ConfigError, match="one for each source of a Concat"):
        experiment(simclr_config("data.sampling.weights=(1.0,2.0)"))


def test_progress_keeps_the_history_in_json():
    progress = Progress(position=96, sampling=Sampling(weights=(1.0, 2.0)).continued((), 0))
    again = Progress(**json.loads(json.dumps(asdict(progress))))
    assert Sampling(weights=(1.0, 2.0)).continued(again.sampling, 96) == progress.sampling
    assert Sampling(weights=(1.0, 5.0)).continued(again.sampling, 96) == [(0, [1.0, 2.0]), (96, [1.0, 5.0])]


def test_a_run_goes_on_with_other_weights(tmp_path):
    """And with a third source."""

    def mixture(steps, *weights):
        parts = tuple({"type": "Subset", "source": "digits:train", "start": k, "step": 3} for k in range(len(weights)))
        source = {"type": "Concat", "sources": parts}
        config = simclr_config(f"steps={steps}", f"data.train={source}", f"data.sampling={ {'weights': weights} }")
        config.evals = {}
        return experiment(config)

    train(mixture(2, 1.0, 3.0), tmp_path)
    train(mixture(4, 2.0, 1.0, 1.0), tmp_path)
    history = CheckpointStore(tmp_path).record(4).progress["sampling"]
    assert history == [[0, [1.0, 3.0]], [32, [2.0, 1.0, 1.0]]]
