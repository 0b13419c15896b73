"""What `bench.fuzz` reads: sound and hostile files of every format, and changes to them."""

import json
import random
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import sentencepiece
from etils import epath
from hostile import CASES, checkpoint_like
from hostile_archives import JPEG, npz, pax
from hostile_archives import member as tar_member
from hostile_pictures import encoded, webp_animation
from hostile_tables import arrow, parquet, tokenizer

from ssljax.checkpoint import CheckpointStore
from ssljax.data import Arrays, pack
from ssljax.digest import MANIFEST, json_digest, write_manifest

LARGEST_SEED = 2**17  # bytes of a hostile file that is changed
LARGEST_CASE = 2**22

Files = dict[str, bytes]  # the first is the one to read, the others lie beside it


def case(seed: int, reader: str, number: int) -> Files:
    """The files of a case: a function of its arguments."""
    return mutated(reader, random.Random(f"{seed}/{reader}/{number}"))


# --- seeds ----------------------------------------------------------------------------------------


@cache
def seeds(reader: str) -> tuple[Files, ...]:
    """What the cases of a reader are made from: sound files first, then the small ones of the corpus."""
    corpus = [dict(case.files()) for case in CASES.values() if case.reader == reader]
    small = [files for files in corpus if sum(map(len, files.values())) <= LARGEST_SEED]
    sound = list(SOUND[reader]())
    return (*sound * max(1, 3 * len(small) // len(sound)), *small)


def sound_pictures() -> Iterator[Files]:
    for mode in ("RGB", "L", "CMYK"):
        for progressive in (False, True):
            yield {"a": encoded("JPEG", mode=mode, progressive=progressive)}
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        yield {"a": encoded("PNG", mode=mode)}
    for options in ({"lossless": True}, {}, {"quality": 5}):
        yield {"a": encoded("WEBP", mode="RGBA", **options)}
    yield {"a": webp_animation((8, 8), 3)}
    for mode in ("L", "P"):
        yield {"a": encoded("GIF", mode=mode)}
        yield {"a": encoded("GIF", mode=mode, interlace=1, transparency=1)}
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield {"a": encoded("BMP", mode=mode)}
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        yield {"a": encoded("TIFF", mode="RGB", compression=compression)}
    yield {"a": encoded("TIFF", mode="1", compression="group4")}


def sound_tars() -> Iterator[Files]:
    sample = [
        tar_member(f"a/{i}.{ending}".encode(), content)
        for i in range(3)
        for ending, content in (("jpg", JPEG), ("cls", b"7"), ("txt", b"a dog"), ("json", b'{"width": 5, "ok": 0.5}'))
    ]
    yield {"a.tar": b"".join(sample) + bytes(1024)}
    long = [
        tar_member(b"L", b"n" * 150 + b".jpg\0", b"L"),
        tar_member(b"x", JPEG),
        pax(path="b/2.jpg", size=str(len(JPEG))),
    ]
    yield {"a.tar": b"".join([*long, tar_member(b"y", JPEG), tar_member(b"d/", kind=b"5")]) + bytes(1024)}
    yield {**dict(CASES["tar: index with negative offsets"].files())}


def sound_npz() -> Iterator[Files]:
    images = np.zeros((3, 4, 4, 3), np.uint8)
    names = np.array(["cat", "dog"])
    yield {
        "a.npz": npz(images=images, labels=np.array([0, 1, 1]), class_names=names, points=np.ones((3, 2), np.float32))
    }
    yield {"a.npz": npz(jpeg=np.frombuffer(JPEG * 2, np.uint8), offsets=np.array([0, len(JPEG), 2 * len(JPEG)]))}
    file = BytesIO()
    np.savez(file, images=np.asfortranarray(images[..., 0]), labels=np.arange(3))
    yield {"a.npz": file.getvalue()}


def sound_tables() -> Iterator[Files]:
    beside = {"images/a.jpg": JPEG, "images/b/c.jpg": JPEG}
    yield {"t.csv": b'image,caption,split\na.jpg,"a ""dog"", running",train\nb/c.jpg,two\xc3\xa9,test\n', **beside}
    yield {"t.tsv": b"image\tcaption\na\ta dog\r\nc\ta cat\n", **beside}
    yield {
        "t.jsonl": b'{"image": "a.jpg", "caption": ["one", "two"]}\n{"image": "c", "caption": "x", "n": 5}\n',
        **beside,
    }


def sound_columns() -> Iterator[Files]:
    plain = {"image": [JPEG, JPEG[:-9]] * 4, "label": [0, 1] * 4, "text": [["a", "b"], ["c"]] * 4}
    yield parquet(plain, row_group_size=3)
    yield parquet(plain, compression="zstd", data_page_version="2.0", use_dictionary=False)
    nested = {"image": [{"bytes": JPEG, "path": "a.jpg"}] * 3, "label": ["cat", "dog", None]}
    yield parquet(nested, compression="gzip")
    yield arrow(pa.array([JPEG] * 5))
    yield arrow(pa.array([JPEG] * 3).dictionary_encode())


def sound_sentencepiece() -> Iterator[Files]:
    for kind in ("unigram", "bpe"):
        model = BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a dog runs", "the cat sleeps all day"] * 50), model_writer=model, vocab_size=50,
            model_type=kind, hard_vocab_limit=False, normalization_rule_name="identity", minloglevel=5,
        )  # fmt: skip
        yield {"m.model": model.getvalue()}


def sound_array_records() -> Iterator[Files]:
    with tempfile.TemporaryDirectory() as folder:
        pack(Arrays({"image": [JPEG] * 3, "label": [0, 1, 2], "text": ["a", "b", "c"]}), folder, shards=1)
        (shard,) = Path(folder).glob("*.array_record")
        yield {shard.name: shard.read_bytes(), "dataset.json": (Path(folder) / "dataset.json").read_bytes()}


def sound_merges() -> Iterator[Files]:
    words = [chr(i) for i in range(33, 127)]
    vocab = {w: i for i, w in enumerate([*words, "do", "g</w>", "dog</w>", "<|startoftext|>", "<|endoftext|>"])}
    yield {"vocab.json": json.dumps(vocab).encode(), "merges.txt": b"#version: 0.2\nd o\ndo g</w>\n"}


def sound_checkpoints() -> Iterator[Files]:
    with tempfile.TemporaryDirectory() as workdir:
        with CheckpointStore(workdir) as store:
            state: Any = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), checkpoint_like())
            store.save(state, 1, {"position": 16}, {"config": {"steps": 3}})
        files = sorted(path for path in Path(workdir).rglob("*") if path.is_file())
        yield {path.relative_to(workdir).as_posix(): path.read_bytes() for path in files}


SOUND: Mapping[str, Callable[[], Iterator[Files]]] = {
    "picture": sound_pictures,
    "tar": sound_tars,
    "npz": sound_npz,
    "captions": sound_tables,
    "parquet": sound_columns,
    "tokenizer.json": lambda: iter([tokenizer(), tokenizer(pre_tokenizer={"type": "Whitespace"})]),
    "clip": sound_merges,
    "sentencepiece": sound_sentencepiece,
    "arrayrecord": sound_array_records,
    "checkpoint": sound_checkpoints,
    "records": lambda: iter([{"metrics.jsonl": b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n'}]),
}


# --- mutations ------------------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 127, 128, 255, 256, 2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40,
           2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
TOKENS = (b'"', b",", b"\n", b"\r", b"\t", b"[", b"]", b"{", b"}", b"\0", b"\xff", b"\\u0000",
          b"\\ud800", b"NaN", b"null", b"1e999", b"-0", b"9" * 5000, b"[" * 2000, b"../", b"/etc/passwd")  # fmt: skip


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at : at + rng.choice((1, 2, 4, 16))] = rng.randbytes(rng.choice((1, 2, 4, 16)))


def set_number(data: bytearray, rng: random.Random) -> None:
    size, order = rng.choice((1, 2, 4, 8)), rng.choice(("<", ">"))
    number = (rng.choice(NUMBERS) + rng.choice((0, 0, 1, -1))) % 256**size
    at = rng.randrange(max(1, len(data) - size))
    data[at : at + size] = struct.pack(order + {1: "B", 2: "H", 4: "I", 8: "Q"}[size], number)


def insert_token(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at : at + rng.choice((0, 0, 1, 4))] = rng.choice(TOKENS)


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def span(data: bytearray, rng: random.Random) -> slice:
    start = rng.randrange(len(data))
    return slice(start, start + rng.choice((1, 4, 12, 64, 512, len(data))))


def cut(data: bytearray, rng: random.Random) -> None:
    del data[span(data, rng)]


def double(data: bytearray, rng: random.Random) -> None:
    piece = data[span(data, rng)]
    at = rng.randrange(len(data))
    data[at:at] = piece * rng.choice((1, 1, 2, 50))


def exchange(data: bytearray, rng: random.Random) -> None:
    a, b = span(data, rng), span(data, rng)
    data[a] = bytes(data[b])


def set_digits(data: bytearray, rng: random.Random) -> None:
    """Another number in a text."""
    runs = [match.span() for match in re.finditer(rb"\d+", data[: 2**14])]
    if runs:
        start, stop = rng.choice(runs)
        data[start:stop] = str(rng.choice(NUMBERS) * rng.choice((1, 1, -1))).encode()


# The gentle ones, which leave most of a file readable, come most often.
MUTATIONS = (*(flip, set_number) * 4, *(overwrite, set_digits, insert_token) * 2, truncate, cut, double, exchange)


def mutated(reader: str, rng: random.Random) -> Files:
    """One case: a seed with one to four changes, and its checksums made right half of the time."""
    files = dict(rng.choice(seeds(reader)))
    names = [name for name in files if not name.startswith("images/")]
    name = rng.choice(names)
    unpacked = reader == "npz" and name == "a.npz" and rng.random() < 0.6  # change the arrays, not the archive
    parts = unzipped(files[name]) if unpacked else {name: files[name]}
    chosen = rng.choice(list(parts))
    data = bytearray(parts[chosen])
    for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
        if not data:
            break
        rng.choice(MUTATIONS)(data, rng)
    if rng.random() < 0.1:  # a piece of another file
        other = next(iter(rng.choice(seeds(reader)).values()))
        at = rng.randrange(len(data) + 1)
        data[at:at] = other[rng.randrange(len(other) + 1) :][: rng.choice((8, 64, 4096))]
    parts[chosen] = bytes(data[:LARGEST_CASE])
    files[name] = zipped(parts) if unpacked else parts[chosen]
    if rng.random() < 0.5 and reader in REPAIRS:
        files[name] = REPAIRS[reader](files[name])
    return repair_checkpoint(files) if reader == "checkpoint" and rng.random() < 0.7 else files


def unzipped(data: bytes) -> Files:
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            found = {m.filename: archive.read(m) for m in archive.infolist() if m.file_size < 2**20}
    except Exception:  # one of the hostile seeds
        found = {}
    return found or {"images.npy": b"\x93NUMPY\x01\0\x10\0{'descr': '|u1'}"}


def zipped(files: Files) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def repair_png(data: bytes) -> bytes:
    """Every chunk's CRC as it should be."""
    fixed, at = bytearray(data), 8
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + length > len(data):
            break
        fixed[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(fixed)


def repair_tar(data: bytes) -> bytes:
    """The checksum of every block that may be a header."""
    fixed = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        block = data[at : at + 512]
        if block[257:262] == b"ustar":
            fixed[at + 148 : at + 156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    return bytes(fixed)


def repair_checkpoint(files: Files) -> Files:
    """Digests of the metadata and of all files as they should be."""
    folder = "checkpoints/1/"
    try:
        metadata = json.loads(files[folder + "_CHECKPOINT_METADATA"])
        ours = metadata["custom_metadata"]
        ours["digest"] = json_digest([1, ours["record"]])
        files[folder + "_CHECKPOINT_METADATA"] = json.dumps(metadata).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    with tempfile.TemporaryDirectory() as place:
        for name, content in files.items():
            path = Path(place, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        write_manifest(epath.Path(place) / folder)
        return files | {folder + MANIFEST: Path(place, folder, MANIFEST).read_bytes()}


REPAIRS: Mapping[str, Callable[[bytes], bytes]] = {"picture": repair_png, "tar": repair_tar}
