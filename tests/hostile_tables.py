"""Hostile tables, columns, tokenisers and logs, built by code: name -> (files, refusal)."""

import base64
import gzip
import io
import json
import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile_archives import EXPLOSIVE, JPEG, MIB, Cases, Files

# tables --------------------------------------------------------------------------------------------------------------


def table(text: bytes, name: str = "t.csv") -> Callable[[], Files]:
    return lambda: {name: text, "images/a.jpg": JPEG, "secret.jpg": JPEG}


def jsonl(text: bytes) -> Callable[[], Files]:
    return table(text, "t.jsonl")


CAPTIONS: Cases = {
    "cell of a gigabyte, in short": (table(b'image,caption\na.jpg,"' + b"x" * 200_000 + b'"\n'), "field limit"),
    "line of 2 MiB": (table(b"image,caption\na.jpg," + b"x" * 2 * MIB), "longer than the limit"),
    "open quotation mark": (table(b'image,caption\na.jpg,"' + b"x\n" * MIB), "field limit"),
    "NUL bytes": (table(b"image,caption\na.jpg,a\0b\n"), None),
    "broken UTF-8": (table(b"image,caption\na.jpg,\xff\xfe\n"), "utf-8"),
    "absolute name": (table(b"image,caption\n/etc/passwd,x\n"), "are not in"),
    "name with ..": (table(b"image,caption\n../secret.jpg,x\n"), "are not in"),
    "name with .. inside": (table(b"image,caption\nx/../a.jpg,x\n"), "are not in"),
    "name of the folder": (table(b"image,caption\n.,x\n"), "are not in"),
    "300,000 columns": (table(b",".join(b"c%d" % i for i in range(100_000)) + b"\n" + b"," * 99_999), "no column"),
    "200,000 empty rows": (table(b"image,caption\n" + b",\n" * 200_000), "are not in"),
    "json nested 100,000 deep": (jsonl(b'{"image":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "json nested in a caption": (jsonl(b'{"image":"a.jpg","caption":' + b"[" * 500 + b"]" * 500 + b"}"), "no column"),
    "json with a huge int": (jsonl(b'{"image":"a.jpg","caption":' + b"9" * 10_000 + b"}"), "integer string"),
    "json of numbers": (jsonl(b'{"image":"a.jpg","caption":NaN}\n{"image":"a.jpg","caption":1e999}'), None),
    "json that is a list": (jsonl(b'["a.jpg"]'), "not a JSON object"),
    "json line of 2 MiB": (jsonl(b'{"image":"a.jpg","caption":"' + b"x" * 2 * MIB + b'"}'), "longer than the limit"),
}  # fmt: skip

# parquet and Arrow ---------------------------------------------------------------------------------------------------


def parquet(columns: Any, **options: Any) -> dict[str, bytes]:
    file = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), file, **options)
    return {"a.parquet": file.getvalue()}


def arrow(array: pa.Array, **options: Any) -> dict[str, bytes]:
    file = io.BytesIO()
    schema = pa.schema([pa.field("image", array.type)])
    with pa.ipc.new_stream(file, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([array], schema=schema))
    return {"a.arrow": file.getvalue()}


def repeated(value: Any, times: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int32)), pa.array([value]))


def in_one_list(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays([0, len(values)], values)


def with_footer_changed(old: bytes, new: bytes, rows: int = 1000) -> dict[str, bytes]:
    """1,000 rows; `old` and `new` are Thrift numbers of as many bytes."""
    data = parquet({"image": [JPEG] * rows})["a.parquet"]
    at = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return {"a.parquet": data[:at] + data[at:].replace(old, new)}


def with_short_histogram() -> dict[str, bytes]:
    """The histogram of levels of the only column, a list of two numbers, loses one of them."""
    data = parquet({"image": [b"x"] * 3})["a.parquet"]
    at, length = data.rindex(b"\x26\x00\x06"), int.from_bytes(data[-8:-4], "little")
    return {"a.parquet": data[:at] + b"\x16\x06" + data[at + 3 : -8] + struct.pack("<I", length - 1) + b"PAR1"}


def with_two_names() -> dict[str, bytes]:
    """A column has one name in the schema, and another in its row group."""
    data = parquet({"image": [{"bytes": JPEG, "path": "a.jpg"}] * 9}, store_schema=False)["a.parquet"]
    at = data.rindex(b"path")
    return {"a.parquet": data[:at] + b"bath" + data[at + 4 :]}


def bomb_with_two_names() -> dict[str, bytes]:
    """Whoever looks for the column by its name sees nothing of it."""
    data = parquet({"image": [bytes(65 * MIB)]}, compression="zstd", store_schema=False)["a.parquet"]
    at = data.rindex(b"image")
    return {"a.parquet": data[:at] + b"imagf" + data[at + 5 :]}


def with_struct_for_kind() -> dict[str, bytes]:
    """The first page header gives a structure where the kind of the page belongs."""
    data = parquet({"image": [JPEG] * 9}, use_dictionary=False)["a.parquet"]
    return {"a.parquet": data[:4] + b"\x1c" + data[5:]}


def footer(length: int, padding: int = 0) -> dict[str, bytes]:
    return {"a.parquet": b"PAR1" + bytes(padding) + struct.pack("<I", length) + b"PAR1"}


def with_metadata(key: bytes, value: bytes) -> dict[str, bytes]:
    return parquet(pa.table({"image": [JPEG]}).replace_schema_metadata({key: value}))


def extension_type() -> dict[str, bytes]:
    """What pyarrow before 14.0.1 unpickled (CVE-2023-47248)."""
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(EXPLOSIVE)}
    return parquet(pa.table({"image": [JPEG]}, pa.schema([pa.field("image", pa.binary(), metadata=metadata)])))


def with_offsets(*offsets: int) -> dict[str, bytes]:
    data = arrow(pa.array([JPEG[:40], JPEG[40:90]]))["a.arrow"]
    return {"a.arrow": data.replace(struct.pack("<iii", 0, 40, 90), struct.pack("<iii", *offsets))}


def nested(depth: int) -> pa.DataType:
    kind = pa.binary()
    for _ in range(depth):
        kind = pa.struct([("a", kind)])
    return kind


_TEXT = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
_DEEP = b'{"info":{"features":' + b"[" * 20_000 + b"]" * 20_000 + b"}}"
PARQUET: Cases = {
    "Zstandard bomb": (lambda: parquet({"image": [bytes(65 * MIB)]}, compression="zstd"), "unpacks to"),
    "Brotli bomb": (lambda: parquet({"image": [bytes(65 * MIB)]}, compression="brotli"), "unpacks to"),
    "one value a million times": (lambda: parquet({"image": repeated(bytes(MIB), MIB)}, store_schema=False), "fewer"),
    "one value 1,000 times": (lambda: parquet({"image": repeated(JPEG + bytes(MIB), 1_000)}, store_schema=False), None),
    "one value in lists": (lambda: parquet({"text": in_one_list(repeated("a" * 10_000, 200_000))}), "more values"),
    "shared beginnings": (lambda: parquet({"text": ["a" * MIB] * 400}, use_dictionary=False, compression="zstd",
                                          column_encoding={"text": "DELTA_BYTE_ARRAY"}), "DELTA_BYTE_ARRAY"),
    "more rows than it has": (lambda: with_footer_changed(b"\xd0\x0f", b"\xfe\x7f"), "fewer bytes|cannot be read"),
    "fewer rows than it has": (lambda: with_footer_changed(b"\xd0\x0f", b"\x82\x01"), None),
    "footer of 4 GiB": (lambda: footer(2**32 - 1), "footer"),
    "footer of 1 MiB": (lambda: footer(MIB, 2 * MIB), "footer"),
    "footer of zeros": (lambda: footer(1000, 1000), "not a complete"),
    "short histogram of levels": (with_short_histogram, "histogram"),
    "column with two names": (with_two_names, "is called 'image.bath'"),
    "bomb with two names": (bomb_with_two_names, "is called 'imagf'"),
    "page of a structured kind": (with_struct_for_kind, "page header at byte 4 is damaged"),
    "nested 99 deep": (lambda: parquet(pa.table({"image": pa.nulls(1, nested(99))})), "is to be the image|deep"),
    "nested 200 deep": (lambda: parquet(pa.table({"image": pa.nulls(1, nested(200))})), "too deeply"),
    "nested features": (lambda: with_metadata(b"huggingface", _DEEP), None),
    "schema of garbage": (lambda: with_metadata(b"ARROW:schema", b"/////w=="), "metadata"),
    "pickled extension type": (extension_type, None),
    "images of numbers": (lambda: parquet({"image": [1]}), "is to be the image"),
    "images of fixed size": (lambda: parquet({"image": pa.array([JPEG], pa.binary(len(JPEG)))}), "is to be the image"),
    "labels of floats": (lambda: parquet({"image": [JPEG], "label": [0.5]}), "is to be the label"),
    "labels of 64 bits": (lambda: parquet({"image": [JPEG], "label": [2**40]}), "32 bits"),
    "text that is not UTF-8": (lambda: parquet({"text": _TEXT}), "utf-8"),
    "class names that are not UTF-8": (lambda: parquet({"image": [JPEG], "label": _TEXT}), "utf-8|UTF8"),
    "garbage": (lambda: {"a.parquet": b"PAR1" + bytes(range(256)) * 9}, "footer|not a complete"),
    "empty": (lambda: {"a.parquet": b""}, "not a complete"),
    "arrow with offsets outside": (lambda: with_offsets(0, 2**30, 2**30), "offset|Offset"),
    "arrow with offsets that fall": (lambda: with_offsets(0, 80, 20), "offset|Offset"),
    "arrow with negative offsets": (lambda: with_offsets(-400, 40, 90), "offset|Offset"),
    "arrow with an entry outside": (lambda: arrow(pa.DictionaryArray.from_arrays(
        pa.array([0, 7, 2**30], pa.int32()), pa.array([JPEG]), safe=False)), "out of bounds|[Ii]nd"),
    "arrow Zstandard bomb": (lambda: arrow(pa.array([bytes(65 * MIB)]), compression="zstd"), "compressed"),
    "arrow of garbage": (lambda: {"a.arrow": bytes(range(256)) * 9}, "not a complete"),
    "arrow message of 2 GiB": (lambda: {"a.arrow": b"\xff" * 4 + struct.pack("<I", 2**31 - 1) + bytes(99)}, "complete"),
    "arrow cut": (lambda: {"a.arrow": arrow(pa.array([JPEG] * 9))["a.arrow"][:-2000]}, "not a complete"),
}  # fmt: skip

# tokenisers and logs -------------------------------------------------------------------------------------------------

_VOCAB = {"a": 0, "</s>": 1, "[UNK]": 2}


def tokenizer(**changes: Any) -> dict[str, bytes]:
    plain = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    model = {"type": "WordLevel", "vocab": _VOCAB, "unk_token": "[UNK]"}
    return {"t.json": json.dumps({"version": "1.0", **plain, "added_tokens": [], "model": model, **changes}).encode()}


def charsmap(size: int, key: str = "precompiled_charsmap") -> dict[str, bytes]:
    text = base64.b64encode(struct.pack("<I", size) + bytes(12)).decode()
    data = tokenizer(normalizer={"type": "Precompiled", "KEY": text})["t.json"]
    return {"t.json": data.replace(b"KEY", key.encode())}


def split_by(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def vocabulary(ids: Any) -> Files:
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": ids}
    return {"vocab.json": json.dumps(words).encode(), "merges.txt": b"#version\na b\n"}


TOKENIZERS: dict[str, tuple[str, Callable[[], Files], str | None]] = {
    "tokenizer of garbage": ("tokenizer.json", lambda: {"t.json": bytes(range(256))}, "not a tokenizer.json"),
    "tokenizer nested 100,000 deep": ("tokenizer.json", lambda: {"t.json": b"[" * 100_000}, "not a tokenizer.json"),
    "tokenizer with a cut charsmap": ("tokenizer.json", lambda: charsmap(2**32 - 1), "precompiled_charsmap is cut"),
    "tokenizer with an escaped charsmap": ("tokenizer.json", lambda: charsmap(2**32 - 1, "\\u0070recompiled_charsmap"),
                                           "precompiled_charsmap is cut"),
    "tokenizer with a bad expression": ("tokenizer.json", lambda: tokenizer(pre_tokenizer=split_by("((((")),
                                        "not a tokenizer.json"),
    "tokenizer that never matches": ("tokenizer.json", lambda: tokenizer(pre_tokenizer=split_by("(.+)+$a")), None),
    "tokenizer with an id of 32 bits": ("tokenizer.json", lambda: tokenizer(model={"type": "WordLevel",
                                        "vocab": {**_VOCAB, "dog": 2**32 - 1}, "unk_token": "[UNK]"}), "than 31 bits"),
    "tokenizer that panics": ("tokenizer.json", lambda: tokenizer(normalizer={"type": "Precompiled"}), "missing field"),
    "tokenizer without an end": ("tokenizer.json", lambda: tokenizer(model={"type": "WordLevel", "vocab": {"[UNK]": 0},
                                 "unk_token": "[UNK]"}), "no token '</s>'"),
    "vocabulary nested 100,000 deep": ("clip", lambda: {"vocab.json": b"[" * 100_000, "merges.txt": b""}, "deeply"),
    "vocabulary of 5 MiB": ("clip", lambda: {"vocab.json": b"[{}," * MIB + b"0]" + b" " * MIB}, "over the limit"),
    "vocabulary with an id of 2^40": ("clip", lambda: vocabulary(2**40), "ids must be"),
    "vocabulary with text for ids": ("clip", lambda: vocabulary("2"), "ids must be"),
    "vocabulary and merges that differ": ("clip", lambda: vocabulary(2), "do not fit"),
    "merges that are a bomb": ("clip", lambda: {"m.txt.gz": gzip.compress(b"a b\n" * 2**24)}, "unpacks to more"),
    "merges of a cut gzip": ("clip", lambda: {"m.txt.gz": gzip.compress(b"a b\n" * 2**24)[:2000]}, "not a list"),
    "merges of a damaged gzip": ("clip", lambda: {"m.txt.gz": gzip.compress(b"a b\n" * 99)[:12] + b"\xff" * 9}, "list"),
    "model of garbage": ("sentencepiece", lambda: {"m.model": bytes(range(256)) * 40}, "not a SentencePiece"),
    "model that is empty": ("sentencepiece", lambda: {"m.model": b""}, "not a SentencePiece|no end"),
    "model with a length of 2^63": ("sentencepiece", lambda: {"m.model": b"\x0a" + b"\xff" * 9 + b"\x7f"}, "not a"),
}  # fmt: skip


def log(text: bytes) -> Callable[[], Files]:
    return lambda: {"metrics.jsonl": b'{"step": 1, "loss": 2.0}\n' + text + b'\n{"step": 3}\n'}


LOGS: Cases = {
    "nested 100,000 deep": (log(b"[" * 100_000), "line 2: .*nested too deeply"),
    "no record": (log(b"[1]"), "line 2: not a record"),
    "step of text": (log(b'{"step": "x"}'), "line 2: not a record"),
    "value of text": (log(b'{"step": 2, "loss": "<script>"}'), "line 2: 'loss' is str"),
    "huge int": (log(b'{"step": 2, "loss": ' + b"9" * 400 + b"}"), "line 2: 'loss' does not fit"),
    "line of 2 MiB": (log(b'{"step": 2, "' + b"x" * 2 * MIB + b'": 1}'), "longer than the limit"),
    "NaN": (log(b'{"step": 2, "loss": NaN}'), None),
    "broken UTF-8": (log(b"\xff\xfe"), "utf-8"),
}  # fmt: skip
