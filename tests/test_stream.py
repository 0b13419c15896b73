"""The stream's promises: one integer of state, the same batches however they are read, bad records replaced."""

import errno
import itertools
import json
import logging
import math
import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from ssljax.data.errors import BadSample
from ssljax.data.host import HostTransform
from ssljax.data.shuffle import shuffled
from ssljax.data.stream import Batches, Loader, check_bad_fraction, eval_batches, train_batches, typical_sample

INLINE = Loader(threads=0)


@dataclass
class Numbers:
    """Record i holds i; records in `bad` cannot be read. Module-level, so that worker processes can unpickle it."""

    n: int
    bad: frozenset[int] = frozenset()
    reads: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict:
        self.reads.append(index)
        if index in self.bad:
            raise BadSample("cannot be read", key=f"record-{index}")
        return {"value": np.float32(index), "key": f"record-{index}"}


def draw(record, rng):
    """The record's number and what its generator says."""
    return {"value": np.asarray(record["value"]), "draw": np.asarray(0.0 if rng is None else rng.uniform())}


def typical(batches):
    """A sample, as `like`."""
    return {name: x[0] for name, x in batches[0].items() if name not in ("index", "replaced")}


def take(batches: Batches, count: int | None = None) -> list[dict[str, np.ndarray]]:
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def flat(batches: list[dict[str, np.ndarray]], name: str = "index") -> np.ndarray:
    return np.concatenate([batch[name] for batch in batches])


def layouts(size: int, processes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each process: neighbouring ones, and every n-th."""
    return np.arange(size).reshape(processes, -1), np.arange(size).reshape(-1, processes).T


def join(parts: list[list[dict[str, np.ndarray]]], rows: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The global batches, from those of each process and the rows that it made."""
    steps, order = zip(*parts, strict=True), np.argsort(rows.ravel())
    return [{name: np.concatenate([part[name] for part in step])[order] for name in step[0]} for step in steps]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [(24, 8), (23, 8), (5, 8), (1, 4)])
def test_every_index_once_per_epoch(n, batch_size):
    """Also where an epoch ends inside a batch, and where a batch holds several epochs."""
    epochs = 6
    steps = -(-n * epochs // batch_size)
    batches = take(train_batches(Numbers(n), draw, batch_size=batch_size, seed=0, steps=steps, loader=INLINE))
    assert len(batches) == steps
    assert batches[0]["index"].dtype == np.int32
    order = flat(batches)[: n * epochs].reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(order, 1), np.tile(np.arange(n), (epochs, 1)))
    if n > 8:
        assert len({tuple(epoch) for epoch in order}) == epochs
    np.testing.assert_array_equal(flat(batches, "value"), flat(batches))


def chi2(counts: np.ndarray) -> float:
    """Pearson's statistic against equal counts, in standard deviations from its mean."""
    freedom = counts.size - 1
    return (((counts - counts.mean()) ** 2 / counts.mean()).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_permutation_is_equally_likely(n):
    epochs = 24_000
    order = shuffled(np.arange(n * epochs), n, seed=n).reshape(epochs, n)
    counts = np.unique(order @ (10 ** np.arange(n)), return_counts=True)[1]
    assert len(counts) == math.factorial(n)
    assert abs(chi2(counts)) < 5


@pytest.mark.parametrize("n", [8, 37, 64, 100, 257])
def test_the_order_is_uniform(n):
    """Over many epochs: every index at every place, every distance of neighbours, every pair of two epochs in a row."""
    epochs = 4000
    order = shuffled(np.arange(n * epochs), n, seed=1).reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(order, 1), np.tile(np.arange(n), (epochs, 1)))
    places = np.zeros((n, n))
    np.add.at(places, (np.arange(n), order), 1)
    # rows and columns both sum to `epochs`: mean n (n - 1), standard deviation n sqrt(2)
    assert abs(((places - epochs / n) ** 2).sum() / (epochs / n) - n * (n - 1)) < 5 * n * np.sqrt(2)
    steps = np.bincount(((order[:, 1:] - order[:, :-1]) % n).ravel(), minlength=n)
    assert steps[0] == 0
    assert abs(chi2(steps[1:])) < 5
    same = (order[1:] == order[:-1]).sum()  # two unrelated permutations agree in one place on average, variance 1
    assert abs(same - (epochs - 1)) < 5 * np.sqrt(epochs)


def test_a_huge_set_is_shuffled_in_place():
    n = 2**31 - 1
    position = 5 * n + np.arange(0, n, n // 100_000)[:100_000]
    index = shuffled(position, n, seed=0)
    assert len(np.unique(index)) == len(index)
    assert 0 <= index.min() < index.max() < n
    assert abs(np.corrcoef(position, index)[0, 1]) < 5 / np.sqrt(len(index))
    assert abs(chi2(np.bincount(index // 2**21, minlength=1024))) < 5


def test_seeds_do_not_share_epochs():
    epochs = {}
    for seed in range(3):
        order = flat(take(train_batches(Numbers(50), draw, batch_size=50, seed=seed, steps=4, loader=INLINE)))
        epochs |= {(seed, i): tuple(epoch) for i, epoch in enumerate(order.reshape(4, 50))}
    assert len(set(epochs.values())) == 12


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_make_the_same_global_batches(processes):
    options: dict[str, Any] = {"batch_size": 12, "seed": 3, "steps": 7, "loader": INLINE}
    source = Numbers(31, bad=frozenset({4, 9}))
    whole = take(train_batches(source, draw, **options))
    for rows in layouts(12, processes):
        parts = [take(train_batches(source, draw, rows=own, **options)) for own in rows]
        assert_same(join(parts, rows), whole)


@pytest.mark.parametrize("step", [1, 5])
def test_starting_later_is_skipping(step):
    options: dict[str, Any] = {"batch_size": 10, "seed": 3, "loader": INLINE}
    source = Numbers(31, bad=frozenset({4, 9}))
    whole = take(train_batches(source, draw, **options), 9)
    assert_same(take(train_batches(source, draw, start=10 * step, **options), 9 - step), whole[step:])


def test_starting_far_away_reads_one_batch():
    source, like = Numbers(1000), draw({"value": np.float32(0)}, None)
    batches = take(train_batches(source, draw, batch_size=16, seed=0, start=10**6 * 16, like=like, loader=INLINE), 1)
    assert len(source.reads) == 16
    assert len(set(batches[0]["index"].tolist())) == 16


@pytest.mark.parametrize("batch_size", [10, 40])  # made in one piece, and in several
@pytest.mark.parametrize(
    "loader",
    [Loader(threads=4), Loader(threads=2, prefetch=1), Loader(threads=0, cache=True), Loader(threads=4, cache=True)],
    ids=["threads", "one ahead", "cache", "cache and threads"],
)
def test_the_loader_does_not_change_the_stream(loader, batch_size):
    options: dict[str, Any] = {"batch_size": batch_size, "seed": 5, "steps": 12}
    source = Numbers(37, bad=frozenset({3, 20}))
    expected = take(train_batches(source, draw, loader=INLINE, **options))
    assert_same(take(train_batches(source, draw, loader=loader, **options)), expected)


def test_worker_processes_do_not_change_the_stream(tmp_path):
    """They count and list bad records as well."""
    options: dict[str, Any] = {"batch_size": 40, "seed": 5, "steps": 12}
    source = Numbers(37, bad=frozenset({3, 20}))
    expected = list(train_batches(source, draw, loader=INLINE, **options))
    batches = train_batches(source, draw, loader=Loader(workers=2), bad_log=tmp_path / "bad.jsonl", **options)
    assert_same(list(batches), expected)
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {"record-3", "record-20"}


@pytest.mark.parametrize("loader", [Loader(threads=4), Loader(workers=2)], ids=["threads", "processes"])
def test_the_loader_does_not_change_an_evaluation(loader):
    source = Numbers(90, bad=frozenset({3, 20, 89}))
    expected = take(eval_batches(source, draw, batch_size=40, loader=INLINE))
    assert_same(take(eval_batches(source, draw, batch_size=40, loader=loader)), expected)


# --- randomness -----------------------------------------------------------------------------------


def test_a_sample_draws_by_seed_epoch_and_index():
    n = 20

    def draws(batch_size, seed=0, start=0, loader=INLINE):
        options: dict[str, Any] = {"seed": seed, "start": start, "loader": loader, "steps": 3 * n // batch_size}
        batches = take(train_batches(Numbers(n), draw, batch_size=batch_size, **options))
        keys = [((start + i) // n, int(index)) for i, index in enumerate(flat(batches))]
        return dict(zip(keys, flat(batches, "draw").tolist(), strict=True))

    expected = draws(10)
    assert len(set(expected.values())) == 3 * n  # every sample of every epoch has its own
    assert draws(4) == expected
    assert draws(20, loader=Loader(threads=3)) == expected
    assert not set(draws(10, seed=1).values()) & set(expected.values())
    later = draws(10, start=n)
    assert all(later[key] == expected[key] for key in later.keys() & expected.keys())


def test_draws_are_uniform_across_samples():
    """Neighbouring keys give unrelated numbers: mean, variance and correlation of neighbours (5 sigma)."""
    n = 20_000
    batch = take(train_batches(Numbers(n), draw, batch_size=n, seed=0, steps=1, loader=INLINE))[0]
    u = batch["draw"][np.argsort(batch["index"])]
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * n)
    assert abs(u.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / n)
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 5 / np.sqrt(n)


# --- bad records ----------------------------------------------------------------------------------


def test_bad_records_are_replaced_in_place(tmp_path, caplog):
    bad = frozenset({3, 11, 25})
    path = tmp_path / "logs" / "bad.jsonl"
    options: dict[str, Any] = {"batch_size": 10, "seed": 2, "steps": 12, "loader": INLINE}
    clean = flat(take(train_batches(Numbers(40), draw, **options)))
    with caplog.at_level(logging.WARNING):
        taken = take(train_batches(Numbers(40, bad), draw, bad_log=path, **options))
        order = flat(taken)
    good = ~np.isin(clean, list(bad))
    np.testing.assert_array_equal(order[good], clean[good])
    assert not np.isin(order, list(bad)).any()
    replaced = flat(taken, "replaced")
    assert replaced.dtype == np.int32
    np.testing.assert_array_equal(replaced > 0, ~good)
    assert replaced.sum() >= (~good).sum() == 9  # three epochs; a replacement may be bad as well
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == [3, 11, 25]  # once, though every epoch meets them
    assert {line["key"] for line in lines} == {"record-3", "record-11", "record-25"}
    assert all(line["reason"] == "cannot be read" for line in lines)
    assert len(caplog.records) == 3
    assert "record-11" in caplog.text


def test_replacements_differ_from_position_to_position():
    source = Numbers(500, frozenset({7}))
    order = flat(take(train_batches(source, draw, batch_size=500, seed=2, steps=10, loader=INLINE))).reshape(10, 500)
    replacements = [int(np.flatnonzero(np.bincount(epoch, minlength=500) == 2)[0]) for epoch in order]
    assert len(set(replacements)) > 7


def test_too_many_bad_records(tmp_path):
    """At 10 % the allowance of the first thousand, 50, is used up after some 500 samples."""
    path = tmp_path / "bad.jsonl"
    source = Numbers(4000, frozenset(range(0, 4000, 10)))
    replaced = flat(take(train_batches(source, draw, batch_size=100, seed=0, loader=INLINE), 30), "replaced")
    bad = np.cumsum(replaced)
    refused = []
    for seen in range(1, 3001):
        try:
            check_bad_fraction(int(bad[seen - 1]), seen, 0.05, path)
        except ValueError as error:
            refused.append((seen, str(error)))
    assert 400 <= refused[0][0] <= 700
    assert "51 bad records among" in refused[0][1]
    assert "more than max_bad_fraction=0.05 allows" in refused[0][1]
    assert str(path) in refused[0][1]
    assert "data.loader.max_bad_fraction" in refused[0][1]
    check_bad_fraction(int(bad[-1]), 3000, 0.15)
    check_bad_fraction(0, 40, 0.0)
    with pytest.raises(ValueError, match=r"1 bad records among 40 samples.*the log names them"):
        check_bad_fraction(1, 40, 0.0)


@pytest.mark.parametrize("loader", [INLINE, Loader(threads=2)])
def test_a_source_of_bad_records_says_so(loader):
    source = Numbers(10, frozenset(range(10)))
    message = r"100 records in a row are bad.*The last, record-\d: cannot be read"
    with pytest.raises(ValueError, match=message):
        next(train_batches(source, draw, batch_size=2, seed=0, loader=loader))
    with pytest.raises(ValueError, match=message):
        next(eval_batches(source, draw, batch_size=2, loader=loader))
    with pytest.raises(ValueError, match=message):
        typical_sample(source, draw)


@dataclass
class Broken(Numbers):
    def __getitem__(self, index: int) -> dict:
        raise OSError(self.n, "stale file handle")


def test_a_failing_disk_ends_the_run():
    """By the same rule as a source of bad records: a file more or less is not the end of the run."""
    with pytest.raises(ValueError, match=r"100 records in a row are bad.*stale file handle"):
        next(train_batches(Broken(10), draw, batch_size=2, seed=0, loader=INLINE))


def test_too_many_open_files_are_no_bad_record():
    with pytest.raises(OSError, match="stale file handle") as caught:
        next(train_batches(Broken(errno.EMFILE), draw, batch_size=2, seed=0, loader=INLINE))
    assert "record " in caught.value.__notes__[0]


def test_a_failing_transform_names_the_record():
    def fail(record, rng):
        raise ZeroDivisionError("oops")

    with pytest.raises(ZeroDivisionError) as caught:
        next(train_batches(Numbers(10), fail, batch_size=2, seed=0, loader=INLINE))
    assert "record-" in caught.value.__notes__[0]


class Stubborn(Exception):
    """Cannot be pickled, for the lambda, nor unpickled, for the two arguments."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")
        self.remedy = lambda: None


@dataclass
class Failing:
    """A transform that goes wrong at record 13. Module-level, so that worker processes can unpickle it."""

    kind: str

    def __call__(self, record, rng):
        if record["value"] == 13:
            match self.kind:
                case "unpicklable":
                    raise Stubborn("oops", "why not")
                case "the end":
                    raise StopIteration("oops")
                case "exit":
                    sys.exit("oops")
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
        return draw(record, rng)


def until_it_fails(kind: str, loader: Loader) -> tuple[list, BaseException]:
    """(the batches before the error, the error)"""
    batches, taken = train_batches(Numbers(40), Failing(kind), batch_size=5, seed=0, loader=loader), []
    with pytest.raises((Stubborn, RuntimeError)) as caught:
        deque(map(taken.append, batches))
    assert list(batches) == []
    return taken, caught.value


@pytest.mark.parametrize("loader", [INLINE, Loader(threads=2)], ids=["inline", "threads"])
@pytest.mark.parametrize("kind", ["unpicklable", "the end", "exit"])
def test_any_error_ends_the_stream_at_its_batch(kind, loader):
    """Also those that Python takes for the end of an iterator, or of the program."""
    expected = take(train_batches(Numbers(40), draw, batch_size=5, seed=0, steps=8, loader=INLINE))
    bad = next(i for i, batch in enumerate(expected) if 13 in batch["index"])
    taken, error = until_it_fails(kind, loader)
    assert_same(taken, expected[:bad])
    assert "record 13, key 'record-13'" in str(error)
    assert "oops" in str(error)


def test_any_error_of_a_worker_process_surfaces():
    _, error = until_it_fails("unpicklable", Loader(workers=1))
    assert "record 13, key 'record-13': Stubborn: oops: why not" in str(error)


def test_a_killed_worker_process_surfaces():
    _, error = until_it_fails("killed", Loader(workers=1))
    assert "worker process of the loader was killed" in str(error)


def test_an_oserror_of_the_decoder_is_a_bad_record():
    def decode(record, rng):
        if record["value"] == 3:
            raise OSError("broken data stream")
        return {"value": np.asarray(record["value"])}

    batches = take(train_batches(Numbers(10), decode, batch_size=10, seed=0, steps=2, loader=INLINE))
    assert 3 not in flat(batches)
    assert flat(batches, "replaced").sum() >= 2


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [(24, 8), (21, 8), (3, 8)])
def test_evaluation_is_in_order_and_padded(n, batch_size):
    batches = take(eval_batches(Numbers(n), draw, batch_size=batch_size, loader=INLINE))
    assert [len(batch["index"]) for batch in batches] == [batch_size] * -(-n // batch_size)
    mask, index, value = (flat(batches, name) for name in ("mask", "index", "value"))
    assert mask.dtype == bool
    assert index.dtype == np.int32
    np.testing.assert_array_equal(index[mask], np.arange(n))
    assert mask[:n].all()
    assert not mask[n:].any()
    assert (value[n:] == n - 1).all()
    assert (flat(batches, "draw") == 0).all()


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("n", [24, 21, 1])
def test_every_process_evaluates_equally_often(processes, n):
    source = Numbers(n, frozenset({7}))
    whole = take(eval_batches(source, draw, batch_size=8, loader=INLINE))
    for rows in layouts(8, processes):
        parts = [take(eval_batches(source, draw, batch_size=8, rows=own, loader=INLINE)) for own in rows]
        assert_same(join(parts, rows), whole)


def test_bad_records_are_masked_in_evaluation(tmp_path):
    path = tmp_path / "bad.jsonl"
    batches = eval_batches(Numbers(10, frozenset({2, 9})), draw, batch_size=4, loader=INLINE, bad_log=path)
    taken = list(batches)
    np.testing.assert_array_equal(flat(taken), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9])
    np.testing.assert_array_equal(flat(taken, "mask"), [1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(flat(taken, "value"), [0, 1, 3, 3, 4, 5, 6, 7, 8, 0, 0, 0])
    assert len(path.read_text().splitlines()) == 2


# --- the rest -------------------------------------------------------------------------------------


@dataclass
class Doubled:
    """A transform in two parts, which counts how often the first one runs."""

    prepared: list[float] = field(default_factory=list)

    def prepare(self, record):
        if "doubled" in record:
            return record
        self.prepared.append(float(record["value"]))
        return {**record, "doubled": record["value"] * 2}

    def __call__(self, record, rng):
        return {"value": np.asarray(self.prepare(record)["doubled"]), "draw": np.asarray(rng.uniform())}


def test_the_cache_keeps_what_is_not_random():
    source, transform = Numbers(10), Doubled()
    options: dict[str, Any] = {"batch_size": 10, "seed": 0, "steps": 4}
    batches = take(train_batches(source, transform, loader=Loader(threads=0, cache=True), **options))
    assert sorted(source.reads) == list(range(10))
    assert sorted(transform.prepared) == list(range(10))
    assert len(set(flat(batches, "draw").tolist())) == 40
    plain = Numbers(10)
    assert_same(take(train_batches(plain, Doubled(), loader=INLINE, like=typical(batches), **options)), batches)
    assert len(plain.reads) == 40


@dataclass
class Pictures:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return {"image": np.zeros((10 + index, 10, 3), np.uint8), "label": index}


def test_images_of_different_size_name_the_remedy():
    shapes = r"'image' is uint8\[11, 10, 3\] for record 1, but uint8\[10, 10, 3\] for the first: .*data\.size"
    with pytest.raises(ValueError, match=shapes):
        next(eval_batches(Pictures(), HostTransform(), batch_size=4, loader=INLINE))
    batch = next(eval_batches(Pictures(), HostTransform(size=10), batch_size=4, loader=INLINE))
    assert batch["image"].shape == (4, 10, 10, 3)
    assert batch["image"].dtype == np.uint8
    np.testing.assert_array_equal(batch["label"], np.arange(4, dtype=np.int32))


def test_samples_with_other_keys():
    def sometimes(record, rng):
        return {"value": np.zeros(1), **({"more": np.zeros(1)} if record["value"] == 2 else {})}

    with pytest.raises(ValueError, match=r"'more' is float64\[1\] for record 2, but missing for the first"):
        next(eval_batches(Numbers(4), sometimes, batch_size=4, loader=INLINE))


def test_arguments_are_checked():
    for rows in (slice(0, 0), slice(None, None, -1), slice(9, 12), np.array([2, 2])):
        with pytest.raises(ValueError, match="in order"):
            train_batches(Numbers(4), draw, batch_size=8, seed=0, rows=rows)
    with pytest.raises(ValueError, match="0 records"):
        train_batches(Numbers(0), draw, batch_size=8, seed=0)
    with pytest.raises(ValueError, match="negative"):
        train_batches(Numbers(4), draw, batch_size=8, seed=-1)
    with pytest.raises(ValueError, match="max_bad_fraction"):
        Loader(max_bad_fraction=5.0)
    with pytest.raises(ValueError, match="prefetch"):
        Loader(prefetch=0)


def test_real_jpegs_from_bytes_to_batches(real_data):
    """CIFAR-10 with one image cut in half: everything arrives but that one."""
    with np.load(real_data / "cifar10" / "test.npz") as archive:
        jpeg, offsets, labels = archive["jpeg"], archive["offsets"], archive["labels"]
    records = [{"image": jpeg[offsets[i] : offsets[i + 1]].tobytes(), "label": int(labels[i])} for i in range(64)]
    records[5]["image"] = records[5]["image"][: len(records[5]["image"]) // 2]
    loader = Loader(cache=True)
    taken = take(train_batches(records, HostTransform(size=32), batch_size=32, seed=0, steps=6, loader=loader))
    assert all(batch["image"].shape == (32, 32, 32, 3) for batch in taken)
    np.testing.assert_array_equal(flat(taken, "label"), labels[flat(taken)])
    assert 5 not in flat(taken)
    assert flat(taken, "replaced").sum() >= 3


def test_the_end_stays_the_end():
    batches = train_batches(Numbers(10), draw, batch_size=5, seed=0, steps=3, loader=Loader(threads=2))
    assert len(list(batches)) == 3
    assert list(batches) == []


def test_closing_ends_the_threads():
    batches = train_batches(Numbers(100), draw, batch_size=4, seed=0, loader=Loader(threads=2))
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


# --- reading ahead --------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [Loader(threads=3, prefetch=5), Loader(threads=1, prefetch=2)])
def test_no_more_is_read_ahead_than_the_loader_says(loader):
    """`start` reads before anyone asks; a consumer that takes nothing does not let memory grow."""
    source = Numbers(1_000)
    batches = train_batches(source, draw, batch_size=10, seed=0, loader=loader)
    assert not source.reads
    batches.start()
    for taken in range(4):
        wait_until(lambda taken=taken: len(source.reads) >= 10 * (loader.prefetch + taken))
        time.sleep(0.1)
        assert len(source.reads) <= 10 * (loader.prefetch + taken + 1) <= 10 * (loader.held + taken)
        next(batches)
    batches.close()


def wait_until(done, seconds=30):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)
