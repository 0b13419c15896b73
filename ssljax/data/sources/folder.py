"""Files in a folder: `Folder`."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ssljax.bounded import read_npz
from ssljax.data.errors import BadSample, UnreadableIsBad
from ssljax.data.media import MEDIA, media_kind
from ssljax.data.sources.base import Record, check_index, expand, extension, read_picture, walk


@dataclass(frozen=True)
class Folder:
    """Your own pictures, videos, sounds, volumes: one sub-folder a class, or all in one folder without labels.

    `path/cat/1.jpg, path/dog/new/2.png` gives `classes == ("cat", "dog")`: the first folder below `path` is the class,
    in sorted order, whatever lies deeper. Hidden files and folders are skipped; symbolic links are followed, loops are
    not.

    Record: `image` (the file's bytes), or `video`, `audio`, `volume`, `points` (its `Path`), or the arrays of an npz
    file; `key` (path below `path`), and `label` if there are classes. An extension of no known kind is a picture's.
    """

    path: str
    extensions: tuple[str, ...] | None = None  # None: the one kind of files (`ssljax.data.media.MEDIA`) that is there
    labelled: bool | None = None  # None: True if every file lies in a sub-folder

    def __post_init__(self) -> None:
        _ = self.labels  # look at the disk now, so that a wrong path fails here

    @cached_property
    def _root(self) -> Path:
        return expand(self.path)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        root = self._root
        if not root.is_dir():
            raise FileNotFoundError(f"there is no folder {root}" + ("; it is a file" if root.is_file() else ""))
        files = list(walk(root))
        wanted = tuple(f".{e.lower().lstrip('.')}" for e in self.extensions or _only_kind(files, root))
        names = sorted(name for name in files if name.lower().endswith(wanted))
        if not names:
            found = sorted({extension(name) for name in files})[:8]
            instead = f"it has files with the extensions {found}" if found else "it is empty"
            what = "file" if self.extensions else "picture"
            raise ValueError(f"no {what} in {root} ({', '.join(e[1:] for e in sorted(wanted))}): {instead}")
        return tuple(names)

    @cached_property
    def _has_labels(self) -> bool:
        loose = [name for name in self._names if "/" not in name]
        if self.labelled is not None:
            if self.labelled and loose:
                raise ValueError(f"{self._root / loose[0]} is in no class folder; move it into one")
            return self.labelled
        if loose and len(loose) < len(self._names):
            raise ValueError(
                f"{self._root} has files beside its folders ({loose[0]!r}, {len(loose)} in all), so the "
                "folders cannot be classes: move these files away, or set labelled=False to use all files "
                "without labels"
            )
        return not loose

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        return tuple(sorted({name.split("/", 1)[0] for name in self._names})) if self._has_labels else ()

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int32 `[n]`, or None without classes."""
        if not self._has_labels:
            return None
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number[name.split("/", 1)[0]] for name in self._names], np.int32)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        i = check_index(index, len(self))
        name = self._names[i]
        with UnreadableIsBad(name):
            record: Record = {**_content(self._root / name, name), "key": name}
        if self.labels is not None:
            record["label"] = int(self.labels[i])
        return record


def _only_kind(files: list[str], root: Path) -> tuple[str, ...]:
    """The endings of the one kind of files there is; of pictures if there is none."""
    counts = Counter(kind for name in files if (kind := media_kind(name)))
    if len(counts) > 1:
        found = ", ".join(f"{count} of the kind {kind!r}" for kind, count in sorted(counts.items()))
        raise ValueError(
            f"{root} has files of several kinds ({found}): say which to use, as in "
            f"extensions={MEDIA[max(counts, key=lambda kind: counts[kind])]}"
        )
    return MEDIA[next(iter(counts), "image")]


def _content(path: Path, key: str) -> Record:
    kind = media_kind(key) or "image"
    if kind == "image":
        return {"image": read_picture(path, key)}
    if kind == "arrays":
        try:
            return read_npz(path)
        except ValueError as error:
            raise BadSample(str(error), key) from error
    return {kind: path}
