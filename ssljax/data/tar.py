"""Tar shards in the webdataset layout, read by offset: `Tar`.

The headers of a shard are read once. The index (names, offsets, sizes) is kept beside it as `<shard>.index.npz`, or in
`~/.cache/ssljax` if the folder is read-only, and is rebuilt when the shard's size or time of change differs. Members
are never extracted: their names are only names.
"""

import hashlib
import os
import tarfile
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ssljax.bounded import parse_json, read_npz
from ssljax.data.errors import BadSample, UnreadableIsBad
from ssljax.data.media import MEDIA
from ssljax.data.sources.base import Missing, OpenFiles, Record, check_index, expand_files, extension
from ssljax.data.tar_headers import Member, read_members

FIELDS: Mapping[str, str] = {
    **{ending: kind for kind in ("video", "audio", "volume", "points") for ending in MEDIA[kind]},
    **{ending: "image" for ending in ("jpg", "jpeg", "png", "webp")},
    "cls": "label",
    "txt": "text",
    "json": "json",
}
"""Extension of a member -> key in the record. `json` spreads an object's str, int and float entries over the record."""

_VERSION = 2  # of the index file
_SCANS = 16  # shards scanned at a time


@dataclass(frozen=True)
class TarIndex:
    """Where each regular file of a shard lies."""

    names: tuple[str, ...]
    offsets: np.ndarray  # int64 [m], of the content
    sizes: np.ndarray  # int64 [m]
    damage: str = ""  # why there are no more of them, if the shard is not whole


def tar_index(path: Path, missing: Missing = "error") -> TarIndex:
    """The index of one shard, from its cache if that is up to date. With `drop`, a damaged shard has its whole files.

    Raises:
        ValueError: the file is empty, truncated, compressed or no tar, or has a link, a device or an unsafe name
        inside.
    """
    index = _cached_index(path)
    if index.damage and missing == "error":
        raise ValueError(
            f"{path} is {index.damage}; copy or download it again, or set missing='drop' to use what can be read"
        )
    return index


def _cached_index(path: Path) -> TarIndex:
    status = path.stat()
    stamp = np.array([_VERSION, status.st_size, status.st_mtime_ns], np.int64)
    beside = path.with_name(path.name + ".index.npz")
    at_home = Path("~/.cache/ssljax").expanduser() / (
        hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24] + ".npz"
    )
    for cache in (beside, at_home):
        if (index := _read_cache(cache, stamp)) is not None:
            return index
    index = _scan(path)
    for cache in (beside, at_home):
        if _write_cache(cache, stamp, index):
            break
    return index


def _scan(path: Path) -> TarIndex:
    with open(path, "rb") as file:
        magic = file.read(6)
        if not magic:
            return TarIndex((), np.zeros(0, np.int64), np.zeros(0, np.int64), "empty (0 bytes)")
        if (
            magic[:2] == b"\x1f\x8b"
            or magic[:3] == b"BZh"
            or magic == b"\xfd7zXZ\x00"
            or magic[:4] == b"\x28\xb5\x2f\xfd"
        ):
            raise ValueError(
                f"{path} is compressed, so its members cannot be read by offset; pictures are compressed already, so "
                "unpack it once (for example `gunzip`) and give the .tar"
            )
        names, offsets, sizes, damage = [], [], [], ""
        try:
            for member in read_members(file):
                _refuse_unsafe(member, path)
                if member.kind == b"0":
                    names.append(member.name.removeprefix("./"))
                    offsets.append(member.offset)
                    sizes.append(member.size)
        except tarfile.TarError as error:
            damage = f"truncated or not a tar file ({error})"
    if not names and not damage:
        raise ValueError(f"{path} has no files inside")
    return TarIndex(tuple(names), np.array(offsets, np.int64), np.array(sizes, np.int64), damage)


def _refuse_unsafe(member: Member, path: Path) -> None:
    if _is_unsafe(member.name):
        raise ValueError(
            f"{path} has a member named {member.name!r}; absolute names and '..' are refused. Write the tar again"
        )
    if member.kind not in (b"0", b"5"):
        raise ValueError(
            f"{path} has a link or device inside: {member.name!r}; only plain files are read. Write the tar again with "
            "links followed (`tar --dereference --hard-dereference`)"
        )


def _is_unsafe(name: str) -> bool:
    return name.startswith("/") or "\0" in name or ".." in name.split("/")


def _read_cache(cache: Path, stamp: np.ndarray) -> TarIndex | None:
    """The saved index. It is believed no more than the shard is: it may name nothing outside of it."""
    size = int(stamp[1])
    try:
        saved = read_npz(cache, most=2**16 + size)  # each member has 512 bytes of header in the shard, and its name
        if not np.array_equal(saved["stamp"], stamp):
            return None
        offsets, sizes = saved["offsets"], saved["sizes"]
        names, damage = (saved[name].tobytes().decode() for name in ("names", "damage"))
    except (OSError, ValueError, KeyError):
        return None  # not there, or unreadable: the shard itself is the truth
    names = tuple(names.split("\0")) if len(offsets) else ()
    inside = all(x.dtype == np.int64 and x.shape == (len(names),) and (x >= 0).all() for x in (offsets, sizes))
    if not inside or (offsets > size).any() or (sizes > size - offsets).any() or any(map(_is_unsafe, names)):
        return None
    return TarIndex(names, offsets, sizes, damage)


def _write_cache(cache: Path, stamp: np.ndarray, index: TarIndex) -> bool:
    names, damage = (np.frombuffer(text.encode(), np.uint8) for text in ("\0".join(index.names), index.damage))
    temporary = None
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        if not cache.parent.stat().st_mode & 0o222:
            return False  # marked read-only: root could write here all the same, but is not meant to
        with tempfile.NamedTemporaryFile(dir=cache.parent, prefix=".index-", delete=False) as file:
            temporary = file.name
            np.savez(file, stamp=stamp, names=names, offsets=index.offsets, sizes=index.sizes, damage=damage)
        os.chmod(temporary, 0o644)
        os.replace(temporary, cache)  # other processes see the old index or the new one, never a half
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True


@dataclass(frozen=True)
class Tar:
    """Tar shards: members that share a name up to the first dot (`a.jpg`, `a.cls`, `a.txt`, `a.json`) are one sample.

    `path` is a file, a glob (`shard-*.tar`) or a range (`shard-{000..009}.tar`). Without `.cls` and `.json` members,
    folders inside the tar are classes as in `Folder` (`cat/1.jpg`; folders that all members have in common do not
    count).

    Record: `image` (bytes of jpg, jpeg, png or webp), `video`, `audio`, `volume`, `points` (bytes), `label` (int, of
    cls or of the folder), `text` (txt), fields of json, `key` (name without extension). Other extensions are left out
    unless `fields` names them: `{"png": "mask"}`.
    """

    path: str
    fields: Mapping[str, str] = field(default_factory=dict)  # extension -> key, beside and before the usual ones
    missing: Missing = "error"  # of shards of a range, and of the end of truncated ones; drop: see `base.Missing`

    def __post_init__(self) -> None:
        _ = self._samples

    @cached_property
    def _shards(self) -> tuple[Path, ...]:
        return expand_files(self.path, "tar shard", self.missing)

    @cached_property
    def _files(self) -> OpenFiles:
        return OpenFiles()

    @cached_property
    def _samples(self) -> "_Samples":
        return _group(self._shards, {**FIELDS, **self.fields}, self.missing)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._samples.folders or ())))

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int32 `[n]` when the labels come from folders, else None."""
        if (folders := self._samples.folders) is None:
            return None
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number[folder] for folder in folders] + [-1] * len(self._samples.lost), np.int32)

    def __len__(self) -> int:
        return len(self._samples.keys) + len(self._samples.lost)

    def __getitem__(self, index: int) -> Record:
        samples, i = self._samples, check_index(index, len(self))
        if i >= len(samples.keys):
            raise BadSample(*samples.lost[i - len(samples.keys)])
        key, shard = samples.keys[i], self._shards[samples.shard[i]]
        record: Record = {}
        if self.labels is not None:
            record["label"] = int(self.labels[i])
        for m in range(samples.first[i], samples.first[i + 1]):
            size = int(samples.sizes[m])
            with UnreadableIsBad(key):
                content = self._files.read(shard, int(samples.offsets[m]), size)
            if len(content) != size:
                raise BadSample(f"{key} in {shard}: the file is shorter than when it was indexed", key)
            name = samples.fields[samples.field_of[m]]
            record.update(_parse(name, content, key, shard))
        record["key"] = key
        return record


def _parse(name: str, content: bytes, key: str, shard: Path) -> Record:
    """The entries that one member adds to the record."""
    if name not in ("label", "text", "json"):
        return {name: content}
    try:
        text = content.decode()
        if name == "label":
            return {name: int(text)}
        if name == "text":
            return {name: text.strip()}
        entries = parse_json(text)
        if not isinstance(entries, dict):
            raise ValueError("the JSON is not an object")
    except ValueError as error:
        raise BadSample(f"{key} in {shard}: cannot read its {name} ({error})", key) from error
    return {k: v for k, v in entries.items() if isinstance(v, str | int | float) and k not in ("image", "key")}


@dataclass(frozen=True)
class _Samples:
    """n samples with m members; those of sample i are `first[i] : first[i + 1]`. Flat arrays: millions stay small."""

    keys: tuple[str, ...]
    shard: np.ndarray  # [n]
    first: np.ndarray  # [n + 1]
    offsets: np.ndarray  # [m]
    sizes: np.ndarray  # [m]
    field_of: np.ndarray  # [m], index into fields
    fields: tuple[str, ...]
    folders: tuple[str, ...] | None  # [n] when folders are classes
    lost: tuple[tuple[str, str], ...]  # (why, name) of shards that are missing or not whole


def _group(shards: tuple[Path, ...], fields: Mapping[str, str], missing: Missing) -> _Samples:
    names_of_fields = tuple(dict.fromkeys(fields.values()))
    number = {name: i for i, name in enumerate(names_of_fields)}
    keys: list[str] = []
    shard_of: list[int] = []
    counts: list[int] = []
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    unknown: set[str] = set()
    damaged: list[tuple[str, str]] = []
    with ThreadPoolExecutor(_SCANS) as pool:  # a scan waits for the disk, at every header
        indices = [pool.submit(tar_index, shard, missing) for shard in shards]
    for s, shard in enumerate(shards):
        try:
            index = indices[s].result()
        except OSError as error:
            if missing == "error":
                raise
            damaged.append((f"the shard {shard} is missing: {error}", shard.name))
            continue
        members: dict[str, dict[int, int]] = {}
        others: dict[str, str] = {}
        for m, name in enumerate(index.names):
            folder, _, base = name.rpartition("/")
            if base.startswith("."):  # hidden files, such as the `._a.jpg` of macOS
                continue
            stem, _, ending = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if (known := fields.get(ending.lower())) is None:
                others[key] = name
                continue
            sample = members.setdefault(key, {})
            if number[known] in sample:
                raise ValueError(
                    f"{shard}: {index.names[sample[number[known]]]!r} and {name!r} are both the {known!r} of one "
                    f"sample (its name ends at the first dot); say what the second is, as in "
                    f"fields={{{ending!r}: 'mask'}}"
                )
            sample[number[known]] = m
        if lost := [name for key, name in others.items() if key not in members and extension(name) in fields]:
            raise ValueError(
                f"{shard}: {lost[0]!r} ({len(lost)} such) belongs to no sample: a sample's name ends at the first dot, "
                f"and all that follows is the extension; known are {', '.join(fields)}. Rename it, or name its "
                f"extension in fields={{...}}"
            )
        if index.damage:
            damaged.append((f"the shard {shard} is {index.damage}", shard.name))
            if len(members) > 1 and members[(last := list(members)[-1])].keys() != next(iter(members.values())).keys():
                del members[last]  # the rest of it is lost
        unknown |= {name.rpartition("/")[2].partition(".")[2] for name in others.values()}
        keys += members
        shard_of += [s] * len(members)
        counts += [len(sample) for sample in members.values()]
        flat = np.array([(m, f) for sample in members.values() for f, m in sample.items()], np.int64).reshape(-1, 2)
        columns.append((index.offsets[flat[:, 0]], index.sizes[flat[:, 0]], flat[:, 1].astype(np.int16)))
    if not keys and damaged:
        raise ValueError(f"no sample is left: {'; '.join(reason for reason, _ in damaged[:3])}")
    if not keys:
        raise ValueError(
            f"no member of {', '.join(map(str, shards[:3]))} has a known extension ({', '.join(fields)}); found are "
            f"{sorted(unknown)[:8]}. Say what they are, as in fields={{'wav': 'audio'}}"
        )
    offsets, sizes, field_of = (np.concatenate(column) for column in zip(*columns, strict=True))
    given = {names_of_fields[f] for f in np.unique(field_of)}
    return _Samples(
        keys=tuple(keys),
        shard=np.array(shard_of, np.int32),
        first=np.concatenate([[0], np.cumsum(counts)]),
        offsets=offsets,
        sizes=sizes,
        field_of=field_of,
        fields=names_of_fields,
        folders=None if given & {"label", "json"} else _class_folders(keys),
        lost=tuple(damaged),
    )


def _class_folders(keys: list[str]) -> tuple[str, ...] | None:
    """The folder of each sample that follows the folders common to all, or None where there is none."""
    folders = [key.split("/")[:-1] for key in keys]
    first, last = min(folders), max(folders)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return tuple(parts[shared] for parts in folders) if all(len(parts) > shared for parts in folders) else None
