"""From a source to batches: the training stream is a pure function of (seed, position), so its state is one integer.

Position `p` lies in epoch `p // n` and takes its index from that epoch's permutation (`ssljax.data.order` knows other
orders); a sample's randomness is keyed by (seed, index, how often it came before). Nothing depends on threads, worker
processes, the batch size or how the rows are shared out, and starting at step 1,000,000 costs what starting at step 0
costs.
"""

import os
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from ssljax.data.buffers import Batch, Kinds
from ssljax.data.errors import BadSample, BadSamples, UnreadableIsBad
from ssljax.data.order import Order, Sampling
from ssljax.data.pieces import Pieces

_ATTEMPTS = 100  # records tried in a row before the source is called unusable
_GRACE = 1_000  # max_bad_fraction is taken of at least so many samples: one bad record of the first ten is no verdict
_VOTES = 12  # samples that say what a sample of the source looks like
_FOREVER = 2**40  # steps


class Records(Protocol):
    """What the stream needs of a source: random access to records (dicts of arrays, bytes, str and numbers)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Transform(Protocol):
    """Record to sample: a dict of arrays whose shapes and types are the same for every record.

    `rng` is None in evaluation, and valid only during the call. An optional method `prepare(record) -> record` is the
    part that needs no `rng` and changes nothing when done twice: `Loader.cache` keeps its result.
    """

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None, /) -> Batch: ...


@dataclass(frozen=True)
class Loader:
    """How batches are read. The batches themselves do not depend on it."""

    threads: int = 4  # that make each batch together; 0: the caller's thread makes it, nothing ahead of time
    workers: int = 0  # processes, instead of threads: where Python's lock is the bottleneck (`ssljax data bench`)
    prefetch: int = 4  # batches under way or waiting
    cache: bool = False  # keep every record, decoded, in memory (once per process); what is random is still drawn anew
    max_bad_fraction: float = 0.05  # of all samples so far (at least 1,000); beyond it the run stops

    def __post_init__(self):
        if min(self.threads, self.workers) < 0 or self.prefetch < 1:
            raise ValueError(f"threads and workers must be at least 0 and prefetch at least 1, got {self}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is a share between 0 and 1, got {self.max_bad_fraction}")

    @property
    def hands(self) -> int:
        """Who make batches while others wait for them."""
        return self.workers or self.threads

    @property
    def held(self) -> int:
        """How many batches are in memory at most: those ready or under way, and the one that was handed out."""
        return self.prefetch + 2 if self.hands else 2


class Batches(Iterator[Batch]):
    """The iterator that `train_batches` and `eval_batches` return.

    `close()` ends its threads and processes, and so do the end of the data and an error; no batch comes after that.
    """

    def __init__(self, steps: "_TrainSteps | _EvalSteps", loader: Loader):
        pieces = Pieces(steps, len(steps.rows), loader.hands, loader.workers)
        # Each process has one piece before it and the next one waiting.
        reading = grain.ReadOptions(
            num_threads=2 * loader.workers or loader.threads,
            prefetch_buffer_size=loader.prefetch * pieces.parts if loader.hands else 0,
        )
        self._pieces: Pieces | None = pieces
        self._items: grain.DatasetIterator[Batch] = iter(grain.MapDataset.source(pieces).to_iter_dataset(reading))

    def __next__(self) -> Batch:
        if self._pieces is None:
            raise StopIteration
        try:
            batch = next(self._items)
            for _ in range(self._pieces.parts - 1):
                batch = next(self._items)
            return batch
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Starts to read ahead, which otherwise the first `next` does."""
        if self._pieces is not None:
            self._items.start_prefetch()

    def close(self) -> None:
        if self._pieces is not None:
            self._pieces.close()
            self._items.close()
        self._pieces = None


def train_batches(
    source: Records,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rows: np.ndarray | slice | None = None,
    order: Order | None = None,
    loader: Loader | None = None,
    steps: int | None = None,
    like: Mapping[str, Any] | None = None,
    bad_log: str | os.PathLike[str] | None = None,
) -> Batches:
    """Shuffled batches: row r of the t-th global batch has position `start + t * batch_size + r`.

    Args:
        batch_size: rows of the global batch; it may exceed the size of the source.
        start: position of the first sample (samples consumed before, by all processes together).
        rows: the rows of the global batch that this process makes, in order; None for all.
        order: of the samples, as `Sampling.order` makes it; None: shuffled anew in each epoch.
        steps: batches to make; None for no end.
        like: arrays (or anything with `shape` and `dtype`) that every sample must resemble, as `typical_sample` gives;
            a record of other arrays, shapes or types is bad. None: it is a ValueError.
        bad_log: a local JSON-lines file; one line is appended for each bad record, once in the life of the file.
            Batches made ahead count: a record may be listed that the run never comes to.

    A bad record (the source or the transform raises `BadSample` or OSError, or see `like`) is listed, and replaced in
    place by a record of the same group of `order`, drawn from (seed, position). Every batch has `index` int32 `[rows]`,
    the record in each row, and `replaced` int32 `[rows]`, the number of bad records met before this row was filled.

    Raises:
        ValueError: shapes differ within a batch; 100 bad records in a row.
    """
    if seed < 0 or start < 0:
        raise ValueError(f"seed and start must not be negative, got seed={seed}, start={start}")
    loader = loader or Loader()
    kinds = None if like is None else {name: (tuple(x.shape), np.dtype(x.dtype)) for name, x in like.items()}
    reader = _Reader(source, transform, loader.cache, kinds)
    length = _FOREVER if steps is None else steps
    own = _rows(rows, batch_size)
    order = order or Sampling().order(source, seed)
    return Batches(_TrainSteps(reader, BadSamples(bad_log), order, seed, start, batch_size, own, length), loader)


def eval_batches(
    source: Records,
    transform: Transform,
    *,
    batch_size: int,
    rows: np.ndarray | slice | None = None,
    loader: Loader | None = None,
    bad_log: str | os.PathLike[str] | None = None,
) -> Batches:
    """The source in order, once. Every process gets the same number of batches, all of full size.

    `mask` bool `[rows]` is False on rows that pad the last batch (repeats of the last sample) and on bad records (which
    hold a neighbour's values, but keep their own `index`). Arguments and errors as in `train_batches`.
    """
    loader = loader or Loader()
    reader = _Reader(source, transform, loader.cache)
    return Batches(_EvalSteps(reader, BadSamples(bad_log), batch_size, _rows(rows, batch_size)), loader)


def typical_sample(source: Records, transform: Transform) -> Batch:
    """A sample of the shapes and types that two thirds of the first twelve samples of a training stream share.

    Every process that reads the same files finds the same.

    Raises:
        ValueError: fewer of them agree.
    """
    order = Sampling().order(source, 0)
    steps = _TrainSteps(_Reader(source, transform), None, order, 0, 0, _VOTES, np.arange(_VOTES), 1)
    samples, indices, _ = zip(*steps.samples(0, slice(None)), strict=True)
    found = [tuple(sorted(_kinds(sample).items())) for sample in samples]
    kind, votes = Counter(found).most_common(1)[0]
    if 3 * votes < 2 * _VOTES:
        for sample, index in zip(samples, indices, strict=True):
            _check_alike(sample, index, _kinds(samples[0]))
    return samples[found.index(kind)]


def check_bad_fraction(bad: int, seen: int, limit: float, bad_log: str | os.PathLike[str] | None = None) -> None:
    """Raises ValueError if `bad` records among `seen` samples are more than the share `limit` of at least 1,000.

    To be called with the counts of all processes, so that all stop together.
    """
    if bad > limit * max(seen, _GRACE):
        where = f"; they are listed in {os.fspath(bad_log)}" if bad_log else "; the log names them"
        raise ValueError(
            f"{bad:,} bad records among {seen:,} samples: more than max_bad_fraction={limit:g} allows{where}. "
            "Repair the data or raise data.loader.max_bad_fraction"
        )


def _rows(rows: np.ndarray | slice | None, batch_size: int) -> np.ndarray:
    own = np.arange(batch_size)[slice(None) if rows is None else rows]
    if not len(own) or (np.diff(own) < 1).any():
        raise ValueError(f"rows={rows} must be a non-empty part of the {batch_size} rows of a batch, in order")
    return own


class _Reader:
    """One sample at a time. Travels to worker processes."""

    def __init__(self, source: Records, transform: Transform, cache: bool = False, kinds: Kinds | None = None):
        if not 0 < len(source) < 2**31:
            raise ValueError(f"the source has {len(source)} records; a stream needs at least 1 and fewer than 2^31")
        self.source, self.transform, self.kinds = source, transform, kinds
        self.prepare = getattr(transform, "prepare", dict)
        self.cache: dict[int, Mapping[str, Any]] | None = {} if cache else None

    def sample(self, index: int, rng: np.random.Generator | None) -> Batch:
        """Raises BadSample, with its key, for a bad record. Every other error names the record as well."""
        record: Mapping[str, Any] = {}
        cache = self.cache
        try:
            with UnreadableIsBad():
                record = self.source[index] if cache is None or index not in cache else cache[index]
                if cache is not None and index not in cache:
                    record = cache[index] = self.prepare(record)
                sample = self.transform(record, rng)
            if self.kinds is not None:
                _check_kinds(sample, self.kinds)
            return sample
        except BadSample as error:
            if error.key is None:
                error.key = record.get("key", index)
            raise
        except (Exception, SystemExit) as error:
            note = f"record {index}, key {record.get('key', '(none)')!r}"
            error.add_note(note)
            if _travels(error):
                raise
            raise RuntimeError(f"{note}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class _TrainSteps:
    reader: _Reader
    bad: BadSamples | None
    order: Order
    seed: int
    start: int
    batch_size: int
    rows: np.ndarray
    steps: int

    def __len__(self) -> int:
        return self.steps

    def kinds(self) -> Kinds:
        kinds = self.reader.kinds or _kinds(next(self.samples(0, slice(1)))[0])
        return _of_rows(kinds, len(self.rows), index=np.int32, replaced=np.int32)

    def fill(self, step: int, rows: slice, batch: Batch) -> None:
        # Each sample goes to its row when it comes, while it is in the caches and few others are in memory.
        put = _Rows(batch, "index", "replaced")
        for row, (sample, index, replaced) in enumerate(self.samples(step, rows), rows.start):
            put(row, sample, index=index, replaced=replaced)

    def samples(self, step: int, rows: slice) -> Iterator[tuple[Batch, int, int]]:
        """Of each row: its sample, the index of its record, and the number of bad records met before it."""
        positions = self.start + step * self.batch_size + self.rows[rows]
        draws, rng = self.order(positions), _SampleRng(self.seed)
        columns = (column.tolist() for column in (positions, *draws))
        return (self._fill(*row, rng=rng) for row in zip(*columns, strict=True))

    def _fill(self, position: int, index: int, visit: int, group: int, *, rng: "_SampleRng") -> tuple[Batch, int, int]:
        for attempt in range(_ATTEMPTS):
            try:
                return self.reader.sample(index, rng.at(visit, index)), index, attempt
            except BadSample as error:
                if self.bad is not None:
                    self.bad.add(index, error)
                last = error
            index = self.order.another(group, np.random.default_rng((self.seed, position, attempt)))
        raise _all_bad(last)


@dataclass(frozen=True)
class _EvalSteps:
    reader: _Reader
    bad: BadSamples
    batch_size: int
    rows: np.ndarray

    def __len__(self) -> int:
        return -(-len(self.reader.source) // self.batch_size)

    def kinds(self) -> Kinds:
        return _of_rows(_kinds(self._read(0)[0]), len(self.rows), index=np.int32, mask=np.bool_)

    def fill(self, step: int, rows: slice, batch: Batch) -> None:
        n, last, put = len(self.reader.source), None, _Rows(batch, "index", "mask")
        for row, position in enumerate((step * self.batch_size + self.rows[rows]).tolist(), rows.start):
            index = min(position, n - 1)
            if index != last:  # each record is read once; the padding repeats the last
                (sample, good), last = self._read(index), index
            put(row, sample, index=index, mask=good and position < n)

    def _read(self, index: int) -> tuple[Batch, bool]:
        """The sample of this record, and True; or of the next good one, and False."""
        n = len(self.reader.source)
        for attempt in range(_ATTEMPTS):
            other = (index + attempt) % n
            try:
                return self.reader.sample(other, None), not attempt
            except BadSample as error:
                self.bad.add(other, error)
                last = error
        raise _all_bad(last)


class _SampleRng:
    """Generators keyed by (seed, index, visit). Philox is a function of a counter, so a new key costs 1 us, not 15."""

    def __init__(self, seed: int):
        self.philox = np.random.Philox(np.random.SeedSequence(seed))
        self.generator = np.random.Generator(self.philox)
        self.state: Any = self.philox.state

    def at(self, visit: int, index: int) -> np.random.Generator:
        self.state["state"]["counter"][2:] = index, visit  # leaves 2^130 draws to each sample
        self.philox.state = self.state
        return self.generator


def _all_bad(last: BadSample) -> ValueError:
    return ValueError(
        f"{_ATTEMPTS} records in a row are bad: this transform cannot read this source. The last, {last.key}: {last}"
    )


def _travels(error: BaseException) -> bool:
    """Whether an error comes back from threads and worker processes as it is, and does not pass for the end."""
    if isinstance(error, StopIteration | SystemExit):
        return False
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return type(copy) is type(error) and str(copy) == str(error) and copy.__notes__ == error.__notes__


def _kinds(sample: Batch) -> Kinds:
    return {name: (x.shape, x.dtype) for name, x in sample.items()}


def _check_kinds(sample: Batch, expected: Kinds) -> None:
    found = _kinds(sample)
    for name in (*expected, *found) if found != expected else ():
        if found.get(name) != expected.get(name):
            raise BadSample(
                f"{name!r} is {_kind(found, name)}, but {_kind(expected, name)} in this run{_hint(found, name)}"
            )


def _kind(kinds: Kinds, name: str) -> str:
    return f"{kinds[name][1]}{list(kinds[name][0])}" if name in kinds else "missing"


def _hint(kinds: Kinds, name: str) -> str:
    return " (set data.size to fit every image to it)" if name in kinds and len(kinds[name][0]) >= 3 else ""


def _check_alike(sample: Batch, index: int, expected: Kinds) -> None:
    kinds = _kinds(sample)
    for name in kinds.keys() | expected.keys() if kinds != expected else ():
        if kinds.get(name) != expected.get(name):
            raise ValueError(
                f"{name!r} is {_kind(kinds, name)} for record {index}, but {_kind(expected, name)} for the first: a "
                f"batch needs one shape{_hint(kinds, name)}"
            )


def _of_rows(kinds: Kinds, rows: int, **columns: type) -> Kinds:
    """Of a batch, from those of a sample, and numbers besides."""
    scalars = {name: ((), np.dtype(column)) for name, column in columns.items()}
    return {name: ((rows, *shape), dtype) for name, (shape, dtype) in {**kinds, **scalars}.items()}


class _Rows:
    """Puts samples, and `columns` of numbers besides, into the rows of a batch."""

    def __init__(self, batch: Batch, *columns: str):
        self.batch = batch
        self.kinds = {name: (x.shape[1:], x.dtype) for name, x in batch.items() if name not in columns}

    def __call__(self, row: int, sample: Batch, *, index: int, **columns: int) -> None:
        _check_alike(sample, index, self.kinds)
        for name, x in {**sample, "index": index, **columns}.items():
            self.batch[name][row] = x
