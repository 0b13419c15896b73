"""Packed texts: every token in one row, once; segments and positions; the cache."""

import os
import pickle
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_helpers import assert_is_a_good_source

from ssljax.config import build
from ssljax.data import (
    Arrays,
    ByteTokenizer,
    Captions,
    HostTransform,
    Loader,
    Packed,
    PackedText,
    Source,
    train_batches,
)
from ssljax.data.packing import best_fit


def source(*texts) -> Arrays:
    return Arrays({"text": list(texts)})


def documents(packed: Packed) -> list[list[int]]:
    """Of all rows, pieces in the order of rows; checks segments, positions and padding."""
    found = []
    for i in range(len(packed)):
        tokens, segments, positions = packed[i]["packed"]
        last = segments.max()
        used = segments > 0
        assert last >= 1
        assert used[: used.sum()].all()  # padding is at the end
        np.testing.assert_array_equal(tokens[~used], 0)
        np.testing.assert_array_equal(np.unique(segments[used]), np.arange(1, last + 1))
        assert (np.diff(segments[used]) >= 0).all()
        for segment in range(1, last + 1):
            np.testing.assert_array_equal(positions[segments == segment], np.arange((segments == segment).sum()))
            found.append(tokens[segments == segment].tolist())
    return found


texts = st.lists(st.text(max_size=40), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(texts, st.integers(1, 50), st.booleans())
def test_every_token_once_and_in_order(texts, length, whole):
    tokenizer = ByteTokenizer(3)
    packed = Packed(source(*texts), tokenizer, length, whole, cache=None, threads=2)
    expected = [tokenizer.ids(text) for text in texts]
    pieces = documents(packed)
    if whole:
        cut = [ids[i : i + length] for ids in expected for i in range(0, len(ids), length)]
        assert sorted(pieces) == sorted(cut)
    else:
        assert list(chain.from_iterable(pieces)) == list(chain.from_iterable(expected))
        assert len(packed) == -(-sum(map(len, expected)) // length)
    assert packed.efficiency == pytest.approx(sum(map(len, expected)) / (len(packed) * length))
    assert all(packed[i]["packed"][1].all() for i in range(len(packed) - 1)) or whole


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_rows_hold_what_fits_and_little_is_wasted(sizes):
    row_of = best_fit(np.array(sizes), 20)
    filled = np.bincount(row_of, sizes)
    assert filled.max() <= 20
    assert filled.min() > 0
    first = [int(np.argmax(row_of == row)) for row in range(len(filled))]
    assert first == sorted(first)  # rows come in the order of the source
    if len(filled) > 1:
        assert np.sort(filled)[:2].sum() > 20  # no two rows could be one


def test_real_captions_are_packed_tightly(real_data, tmp_path):
    emoji = real_data / "emoji"
    captions = Captions(str(emoji / "captions.csv"), str(emoji / "style_3d.tar"), "id", ("en", "de"))
    packed = Packed(captions, ByteTokenizer(3), 128, cache=str(tmp_path))
    assert packed.efficiency > 0.99
    assert len(documents(packed)) == sum(len(captions[i]["text"]) for i in range(len(captions)))


def test_rows_become_batches_and_configs_name_them(tmp_path):
    words = source(*("word " * (i % 7 + 1) for i in range(50)))
    packed = Packed(words, ByteTokenizer(3), 64, cache=str(tmp_path))
    assert_is_a_good_source(packed)
    reader = PackedText(64)
    batch = next(train_batches(packed, HostTransform(readers={"packed": reader}), seed=0, batch_size=4, steps=1,
                               loader=Loader(threads=0)))  # fmt: skip
    assert (batch["replaced"] == 0).all()
    for name in ("text", "segments", "positions"):
        assert (batch[name].shape, batch[name].dtype) == ((4, 64), np.int32)
        assert reader.blank()[name].shape == (64,)
    config = {"type": "Packed", "source": {"type": "Scenes"}, "tokenizer": {"type": "ByteTokenizer", "length": 9},
              "length": 64, "cache": str(tmp_path)}  # fmt: skip
    assert len(build(Source, config)) > 10
    with pytest.raises(ValueError, match="at least 1"):
        Packed(words, ByteTokenizer(3), 0)


# --- the cache ------------------------------------------------------------------------------------


class Counting(Arrays):
    """Says how often it was read."""

    reads = 0

    def __getitem__(self, index):
        Counting.reads += 1
        return super().__getitem__(index)


def tokens(packed: Packed) -> list[np.ndarray]:
    return [packed[i]["packed"] for i in range(len(packed))]


def test_tokens_are_kept_and_stale_ones_are_not_used(tmp_path):
    texts = [f"text {i} " * 5 for i in range(300)]

    def reads(texts, tokenizer=ByteTokenizer(3), length=100) -> int:
        Counting.reads = 0
        packed = Packed(Counting({"text": texts}), tokenizer, length, cache=str(tmp_path))
        fresh = Packed(source(*texts), tokenizer, length, cache=None)
        for ours, theirs in zip(tokens(packed), tokens(fresh), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        return Counting.reads

    sampled = 64
    assert reads(texts) == sampled + 300
    assert reads(texts) == sampled
    assert reads(texts, length=30) == sampled  # the rows are others, the tokens are not
    assert reads(texts, ByteTokenizer(9)) == sampled
    assert reads(texts[:-1]) == sampled + 299  # another length
    assert reads(["another", *texts[1:]]) == sampled + 300
    assert reads(texts, Shifted(3)) == sampled + 300  # another tokeniser
    assert len(os.listdir(tmp_path)) == 4
    damages = (
        lambda path: os.truncate(path, 200),
        lambda path: path.write_bytes(b"PK\x03\x04"),
        lambda path: np.save(path, np.zeros(5, np.int32)),
        lambda path: np.save(path, np.array([None])),
        Path.unlink,
    )
    for damage in damages:
        for name in ("tokens.npy", "offsets.npy"):
            for folder in tmp_path.iterdir():
                damage(folder / name)
            assert reads(texts) == sampled + 300
            assert reads(texts) == sampled


class Shifted(ByteTokenizer):
    def ids(self, text):
        return super().ids(text)[::-1]


def test_a_cache_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    packed = Packed(source("a", "b"), ByteTokenizer(3), 8, cache=str(tmp_path / "file"))
    assert len(packed) == 1
    assert "cannot be kept" in caplog.text
    assert not list(tmp_path.glob("**/.unfinished*"))


def test_a_pickled_copy_is_small_and_the_same(tmp_path):
    packed = Packed(source(*["abc" * 100] * 500), ByteTokenizer(3), 512, cache=str(tmp_path))
    rows = tokens(packed)
    copy = pickle.loads(pickle.dumps(packed))
    assert "_tokens" not in vars(copy)
    for ours, theirs in zip(tokens(copy), rows, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    shutil.rmtree(tmp_path)
    assert len(tokens(packed)) == len(rows)  # mapped files live on


def test_records_without_text_are_counted(caplog):
    some = Arrays({"text": ["a", None, ("b", "c"), 5, (), "d"]})
    packed = Packed(some, ByteTokenizer(3), 100, cache=None)
    assert len(documents(packed)) == 4
    assert "3 of 6 records have no readable text; the first: record 1" in caplog.text
    with pytest.raises(ValueError, match="none of the 2 records has a text"):
        len(Packed(Arrays({"text": [None, 3]}), ByteTokenizer(3), 9, cache=None))
    with pytest.raises(ValueError, match="no 'text', only"):
        len(Packed(Arrays({"label": np.zeros(2, int)}), ByteTokenizer(3), 9, cache=None))
