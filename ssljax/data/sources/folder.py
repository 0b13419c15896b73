"""Pictures in a folder: `Folder`."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ssljax.data.errors import UnreadableIsBad
from ssljax.data.sources.base import PICTURES, Record, check_index, expand, extension, read_picture, walk


@dataclass(frozen=True)
class Folder:
    """Your own pictures: one sub-folder a class, or all in one folder without labels.

    `path/cat/1.jpg, path/dog/new/2.png` gives `classes == ("cat", "dog")`: the first folder below `path` is the class,
    in sorted order, whatever lies deeper. Hidden files and folders are skipped; symbolic links are followed, loops are
    not.

    Record: `image` (the file's bytes), `key` (path below `path`), and `label` if there are classes.
    """

    path: str
    extensions: tuple[str, ...] = PICTURES
    labelled: bool | None = None  # None: True if every picture lies in a sub-folder

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
        wanted = {e.lower().lstrip(".") for e in self.extensions}
        files = list(walk(root))
        names = sorted(name for name in files if extension(name) in wanted)
        if not names:
            found = sorted({extension(name) for name in files})[:8]
            instead = f"it has files with the extensions {found}" if found else "it is empty"
            raise ValueError(f"no picture in {root} ({', '.join(sorted(wanted))}): {instead}")
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
                f"{self._root} has pictures beside its folders ({loose[0]!r}, {len(loose)} in all), so the "
                "folders cannot be classes: move these pictures away, or set labelled=False to use all pictures "
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
            record: Record = {"image": read_picture(self._root / name, name), "key": name}
        if self.labels is not None:
            record["label"] = int(self.labels[i])
        return record
