"""From a source to batches: the training stream is a pure function of (seed, position), so its state is one integer.

Position `p` lies in epoch `p // n` and takes its index from that epoch's permutation; a sample's randomness is keyed by
(seed, epoch, index). Nothing depends on threads, worker processes, the batch size or how the rows are shared out, and
starting at step 1,000,000 costs what starting at step 0 costs.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from ssljax.data.errors import BadSample
from ssljax.data.shuffle import shuffled

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

_ATTEMPTS = 100  # records tried in a row before the source is called unusable
_GRACE = 1_000  # max_bad_fraction is taken of at least so many samples: one bad record of the first ten is no verdict
_BAD = "_bad"  # number of bad records met while a batch was made: how worker processes tell the main process
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

    threads: int = 4  # each makes whole batches; 0: in the caller's thread, nothing ahead of time
    workers: int = 0  # processes, each with `threads` threads; worth it when Python, not decoding, is the bottleneck
    prefetch: int = 8  # batches under way or waiting, per process; at least `threads` of them to keep every thread busy
    cache: bool = False  # keep every record, decoded, in memory (once per process); what is random is still drawn anew
    max_bad_fraction: float = 0.05  # of the samples this host has seen (at least 1,000); beyond it the run stops

    def __post_init__(self):
        if min(self.threads, self.workers) < 0 or self.prefetch < 1:
            raise ValueError(f"threads and workers must be at least 0 and prefetch at least 1, got {self}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is a share between 0 and 1, got {self.max_bad_fraction}")


class Batches(Iterator[Batch]):
    """The iterator that `train_batches` and `eval_batches` return. `seen` and `bad` count this process's samples.

    `close()` ends its threads and processes, and so do the end of the data and an error; no batch comes after that.
    """

    def __init__(self, steps: "_TrainSteps | _EvalSteps", loader: Loader):
        self.seen = self.bad = 0
        self._limit, self._log = loader.max_bad_fraction, steps.reader.bad_log
        threads = loader.threads
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=loader.prefetch if threads else 0)
        data = grain.MapDataset.source(steps).to_iter_dataset(reading)
        if loader.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, and only absl's own app.run parses them
            data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=loader.workers))
        self._batches: grain.DatasetIterator[Batch] | None = iter(data)

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        try:
            batch = next(self._batches)
            bad = int(batch.pop(_BAD))
            self.bad += bad
            self.seen += len(batch["index"])
            if bad and self.bad > self._limit * max(self.seen, _GRACE):
                where = f"; they are listed in {self._log}" if self._log else "; the log names them"
                raise ValueError(
                    f"{self.bad} bad records among {self.seen} samples: more than max_bad_fraction={self._limit:g}"
                    f" allows{where}. Repair the data or raise data.loader.max_bad_fraction"
                )
        except BaseException:
            self.close()
            raise
        return batch

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches = None  # and lets go of the threads


def train_batches(
    source: Records,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rows: np.ndarray | slice | None = None,
    loader: Loader | None = None,
    steps: int | None = None,
    bad_log: str | os.PathLike[str] | None = None,
) -> Batches:
    """Shuffled batches: row r of the t-th global batch has position `start + t * batch_size + r`.

    Args:
        batch_size: rows of the global batch; it may exceed the size of the source.
        start: position of the first sample (samples consumed before, by all processes together).
        rows: the rows of the global batch that this process makes, in order; None for all.
        steps: batches to make; None for no end.
        bad_log: a local JSON-lines file; one line is appended for each bad record.

    A bad record (the source or the transform raises `BadSample`, or the transform OSError) is counted, logged and
    replaced in place by a record drawn from (seed, position). Every batch has `index` int32 `[rows]`: the record in
    each row.

    Raises:
        ValueError: shapes differ within a batch; too many bad records (`Loader.max_bad_fraction`), or 100 in a row.
        OSError: the source cannot be read.
    """
    if seed < 0 or start < 0:
        raise ValueError(f"seed and start must not be negative, got seed={seed}, start={start}")
    loader = loader or Loader()
    reader = _Reader(source, transform, loader.cache, bad_log)
    length = _FOREVER if steps is None else steps
    return Batches(_TrainSteps(reader, seed, start, batch_size, _rows(rows, batch_size), length), loader)


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
    reader = _Reader(source, transform, loader.cache, bad_log)
    return Batches(_EvalSteps(reader, batch_size, _rows(rows, batch_size)), loader)


def _rows(rows: np.ndarray | slice | None, batch_size: int) -> np.ndarray:
    own = np.arange(batch_size)[slice(None) if rows is None else rows]
    if not len(own) or (np.diff(own) < 1).any():
        raise ValueError(f"rows={rows} must be a non-empty part of the {batch_size} rows of a batch, in order")
    return own


class _Reader:
    """One sample at a time, and what is to be done about bad ones. Travels to worker processes."""

    def __init__(self, source: Records, transform: Transform, cache: bool, bad_log: str | os.PathLike[str] | None):
        if not 0 < len(source) < 2**31:
            raise ValueError(f"the source has {len(source)} records; a stream needs at least 1 and fewer than 2^31")
        self.source, self.transform, self.bad_log = source, transform, bad_log
        self.prepare = getattr(transform, "prepare", dict)
        self.cache: dict[int, Mapping[str, Any]] | None = {} if cache else None
        self.reported: set[int] = set()
        if bad_log is not None:
            Path(bad_log).parent.mkdir(parents=True, exist_ok=True)

    def sample(self, index: int, rng: np.random.Generator | None) -> Batch | None:
        """The sample, or None where the record is bad."""
        record: Mapping[str, Any] = {}
        cache = self.cache
        try:
            record = self.source[index] if cache is None or index not in cache else cache[index]
            try:
                if cache is not None and index not in cache:
                    record = cache[index] = self.prepare(record)
                return self.transform(record, rng)
            except OSError as error:  # the decoder's; from the source it means a failing disk, and ends the run
                raise BadSample(str(error)) from error
        except BadSample as error:
            self.report(index, record.get("key", index) if error.key is None else error.key, str(error))
            return None
        except Exception as error:
            error.add_note(f"record {index}, key {record.get('key', '(none)')!r}")
            raise

    def report(self, index: int, key: str | int, reason: str) -> None:
        if index in self.reported:
            return
        self.reported.add(index)
        log.warning("bad record %d (%s): %s", index, key, reason)
        if self.bad_log is not None:
            line = json.dumps({"index": index, "key": key, "reason": reason}) + "\n"
            file = os.open(self.bad_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(file, line.encode())  # one write in append mode: lines of several processes do not mix
            finally:
                os.close(file)


@dataclass(frozen=True)
class _TrainSteps:
    """Step -> batch. Whole batches are grain's elements, which keeps its cost per element off the samples."""

    reader: _Reader
    seed: int
    start: int
    batch_size: int
    rows: np.ndarray
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        n = len(self.reader.source)
        positions = self.start + index * self.batch_size + self.rows
        rng = _SampleRng(self.seed)
        samples, picks, bad = [], shuffled(positions, n, self.seed).tolist(), 0
        for row, position in enumerate(positions.tolist()):
            for attempt in range(_ATTEMPTS):
                sample = self.reader.sample(picks[row], rng.at(position // n, picks[row]))
                if sample is not None:
                    break
                bad += 1
                picks[row] = int(np.random.default_rng((self.seed, position, attempt)).integers(n))
            else:
                raise _all_bad(self.reader)
            samples.append(sample)
        return {**_stack(samples, picks), "index": np.array(picks, np.int32), _BAD: np.array(bad)}


@dataclass(frozen=True)
class _EvalSteps:
    reader: _Reader
    batch_size: int
    rows: np.ndarray

    def __len__(self) -> int:
        return -(-len(self.reader.source) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        n = len(self.reader.source)
        positions = index * self.batch_size + self.rows
        picks = np.minimum(positions, n - 1).astype(np.int32)
        mask = positions < n
        samples, bad = [], 0
        for row in range(len(np.unique(picks))):  # each record once; the padding repeats the last
            for attempt in range(_ATTEMPTS):
                sample = self.reader.sample((int(picks[row]) + attempt) % n, None)
                if sample is not None:
                    break
                if attempt == 0 and mask[row]:
                    mask[row], bad = False, bad + 1
            else:
                raise _all_bad(self.reader)
            samples.append(sample)
        samples += [samples[-1]] * (len(picks) - len(samples))
        return {**_stack(samples, picks), "index": picks, "mask": mask, _BAD: np.array(bad)}


class _SampleRng:
    """Generators keyed by (seed, epoch, index). Philox is a function of a counter, so a new key costs 1 us, not 15."""

    def __init__(self, seed: int):
        self.philox = np.random.Philox(np.random.SeedSequence(seed))
        self.generator = np.random.Generator(self.philox)
        self.state: Any = self.philox.state

    def at(self, epoch: int, index: int) -> np.random.Generator:
        self.state["state"]["counter"][2:] = index, epoch  # leaves 2^130 draws to each sample
        self.philox.state = self.state
        return self.generator


def _all_bad(reader: _Reader) -> ValueError:
    where = f"see {reader.bad_log}" if reader.bad_log else "see the log"
    return ValueError(f"{_ATTEMPTS} records in a row are bad ({where}): this transform cannot read this source")


def _stack(samples: Sequence[Batch], indices: Sequence[int] | np.ndarray) -> Batch:
    first = samples[0]
    for index, sample in zip(indices, samples, strict=True):
        if sample.keys() != first.keys():
            raise ValueError(f"record {indices[0]} gives {sorted(first)}, but record {index} gives {sorted(sample)}")
        for name, value in sample.items():
            if value.shape != first[name].shape or value.dtype != first[name].dtype:
                raise ValueError(
                    f"{name!r} is {first[name].dtype}{list(first[name].shape)} for record {indices[0]}, but "
                    f"{value.dtype}{list(value.shape)} for record {index}: a batch needs one shape"
                    + (" (set data.size to fit every image to it)" if value.ndim >= 3 else "")
                )
    return {name: np.stack([sample[name] for sample in samples]) for name in first}
