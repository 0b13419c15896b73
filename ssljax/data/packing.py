"""Texts tokenised once and laid into rows of one length: `Packed`, a source, and `PackedText`, its reader."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ssljax.data.errors import BadSample
from ssljax.data.fields import caption, shown
from ssljax.data.sources.base import Record, Source, check_index, expand
from ssljax.data.tokenize import Tokenizer

log = logging.getLogger(__name__)

_VERSION = 1  # of the cache
_SAMPLED = 64  # texts, spread over the source, that tell whether a cache is still right
_AT_ONCE = 1024  # records a thread takes


@dataclass(frozen=True)
class Packed:
    """Rows of exactly `length` tokens, of the texts of another source. Every token of every text is in one row, once.

    Record: `packed` int32 `[3, length]`, for `PackedText`: tokens; the number of each token's document in the row, 1,
    2, ...; its position in that document. All are 0 where a row is not full. Each of several captions of a record is a
    document. Records without a readable text are left out, and counted in the log.

    The tokens are kept in `cache`, a folder, under a name made of the source's length, the tokeniser's settings and 64
    of the texts with their tokens: where one of them is another, or a file is damaged, all is tokenised anew. (A change
    of other texts alone is not noticed: delete the folder, or set `cache` to None to keep tokens in memory only.)
    """

    source: Source
    tokenizer: Tokenizer  # its own length plays no part
    length: int
    whole: bool = True  # documents stay whole (longer ones are cut into rows); False: one stream, cut where rows end
    cache: str | None = "~/.cache/ssljax/packed"
    threads: int = 4

    def __post_init__(self) -> None:
        if self.length < 1 or self.threads < 1:
            raise ValueError(f"length {self.length} and threads {self.threads} must be at least 1")

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # no tokens: they are in the cache

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    @property
    def efficiency(self) -> float:
        """Share of the rows that is tokens."""
        return len(self._tokens[0]) / (len(self) * self.length)

    def __len__(self) -> int:
        return len(self._rows[0]) - 1

    def __getitem__(self, index: int) -> Record:
        i, (tokens, _), (first, pieces) = check_index(index, len(self)), self._tokens, self._rows
        row, at = np.zeros((3, self.length), np.int32), 0
        for number, (start, stop) in enumerate(pieces[first[i] : first[i + 1]].tolist(), 1):
            end = at + stop - start
            row[0, at:end], row[1, at:end], row[2, at:end] = tokens[start:stop], number, np.arange(stop - start)
            at = end
        return {"packed": row, "key": f"row {i}"}

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """First piece of each row `[n + 1]`; the pieces `[p, 2]`, start and stop of their tokens, row after row."""
        tokens, offsets = self._tokens
        first, pieces = self._whole(offsets) if self.whole else self._stream(offsets)
        rows = len(first) - 1
        share = 100 * len(tokens) / (rows * self.length)
        log.info("%d tokens in %d rows of %d, which are %.1f %% full", len(tokens), rows, self.length, share)
        return first, pieces

    def _stream(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ends = np.arange(0, offsets[-1], self.length)
        bounds = np.unique(np.concatenate([offsets, ends]))
        pieces = np.stack([bounds[:-1], bounds[1:]], 1)
        return np.append(np.searchsorted(pieces[:, 0], ends), len(pieces)), pieces

    def _whole(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = -(-np.diff(offsets) // self.length)  # pieces of each document
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(offsets[:-1], counts) + nth * self.length
        pieces = np.stack([starts, np.append(starts[1:], offsets[-1])], 1)
        row_of = best_fit(pieces[:, 1] - pieces[:, 0], self.length)
        order = np.argsort(row_of, kind="stable")
        return np.searchsorted(row_of[order], np.arange(row_of.max() + 2)), pieces[order]

    @cached_property
    def _tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """All tokens, int32; the offsets of the documents in them `[d + 1]`."""
        if not len(self.source):
            raise ValueError("the source has no records")
        folder = None if self.cache is None else expand(self.cache) / self._stamp()
        found = None if folder is None else _load(folder)
        if found is None:
            found = self._tokenize()
            if folder is not None:
                _save(folder, *found)
                found = _load(folder) or found  # mapped, so that processes share the memory
        return found

    def _tokenize(self) -> tuple[np.ndarray, np.ndarray]:
        parts: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        lost: list[str] = []
        starts = range(0, len(self.source), _AT_ONCE)
        with ThreadPoolExecutor(self.threads) as threads:
            for found, sizes, errors in threads.map(self._tokenize_from, starts):
                parts.append(found)
                lengths.append(sizes)
                lost += errors
        if lost:
            log.warning("%d of %d records have no readable text; the first: %s", len(lost), len(self.source), lost[0])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
        if len(offsets) == 1:
            raise ValueError(f"none of the {len(self.source):,} records has a text: {lost[0]}")
        return np.concatenate(parts), offsets

    def _tokenize_from(self, start: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Tokens, their number in each document, and what cannot be read."""
        documents: list[list[int]] = []
        lost: list[str] = []
        for i in range(start, min(start + _AT_ONCE, len(self.source))):
            try:
                documents += [self.tokenizer.ids(text) for text in _texts(self.source[i])]
            except (BadSample, OSError) as error:
                lost.append(f"record {i}: {error}")
        sizes = np.array([len(ids) for ids in documents], np.int64)
        return np.fromiter(chain.from_iterable(documents), np.int32), sizes, lost

    def _stamp(self) -> str:
        """Hexadecimal; another wherever the tokens can be expected to be others."""
        settings = asdict(self.tokenizer) if is_dataclass(self.tokenizer) else {}  # type: ignore[call-overload]
        settings = {name: str(value) for name, value in settings.items() if name != "length"}
        digest = xxhash.xxh3_128()
        digest.update(json.dumps([_VERSION, len(self.source), type(self.tokenizer).__name__, settings]).encode())
        for i in np.unique(np.linspace(0, len(self.source) - 1, _SAMPLED).astype(int)).tolist():
            with suppress(BadSample, OSError):
                for text in _texts(self.source[i]):
                    digest.update(json.dumps([i, text, self.tokenizer.ids(text)]).encode())
        return digest.hexdigest()


def _texts(record: Record) -> Iterable[str]:
    text = record.get("text")
    if text is None:
        raise BadSample(f"no 'text', only {sorted(record)}")
    caption(text, None)  # raises unless it is a text, or several
    return (text,) if isinstance(text, str) else tuple(text)


def best_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """The row of each piece: the longest pieces first, each into the row that it leaves the least room in (Johnson
    1974). Rows are numbered by the first piece that they hold. No piece may be longer than `room`."""
    open_rows: list[list[int]] = [[] for _ in range(room + 1)]  # by the room left
    some = 0  # bit r: there is a row with room r
    row_of, rows = np.empty(len(sizes), np.int64), 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fits = some >> size
        if fits:
            left = size + (fits & -fits).bit_length() - 1
            row = open_rows[left].pop()
            if not open_rows[left]:
                some ^= 1 << left
        else:
            row, left, rows = rows, room, rows + 1
        row_of[piece] = row
        if left > size:
            open_rows[left - size].append(row)
            some |= 1 << (left - size)
    first = np.full(rows, len(sizes))
    np.minimum.at(first, row_of, np.arange(len(sizes)))
    return np.argsort(np.argsort(first, kind="stable"), kind="stable")[row_of]


def _load(folder: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The tokens in a cache; None without one, or where it is damaged."""
    try:
        tokens, offsets = (np.lib.format.open_memmap(folder / f"{name}.npy", "r") for name in ("tokens", "offsets"))
    except (OSError, ValueError, EOFError):
        return None
    sound = tokens.dtype == np.int32 and offsets.dtype == np.int64 and tokens.ndim == offsets.ndim == 1
    sound = sound and len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(tokens)
    return (tokens, offsets) if sound and (np.diff(offsets) > 0).all() else None


def _save(folder: Path, tokens: np.ndarray, offsets: np.ndarray) -> None:
    """Other processes see all of it, or nothing. What cannot be written is named in the log."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-", ignore_cleanup_errors=True) as name:
            made = Path(name) / "made"
            made.mkdir()
            np.save(made / "tokens.npy", tokens)
            np.save(made / "offsets.npy", offsets)
            with suppress(OSError):  # another process was quicker
                if folder.exists() and _load(folder) is None:
                    shutil.rmtree(folder)
                os.rename(made, folder)
    except OSError as error:
        log.warning("the tokens cannot be kept in %s: %s", folder, error)


@dataclass(frozen=True)
class PackedText:
    """Reads the entry `packed` of `Packed`: `{"text", "segments", "positions"}`, int32 `[length]` each."""

    length: int

    def __call__(self, value: Any, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        if not isinstance(value, np.ndarray) or value.shape != (3, self.length) or value.dtype.kind not in "iu":
            raise BadSample(f"'packed' is {shown(value)}; expected integers [3, {self.length}]")
        text, segments, positions = value.astype(np.int32, copy=False)
        return {"text": text, "segments": segments, "positions": positions}

    def blank(self) -> dict[str, np.ndarray]:
        """An empty row."""
        return {name: np.zeros(self.length, np.int32) for name in ("text", "segments", "positions")}
