"""A table of captions beside pictures: `Captions`."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ssljax.data.errors import BadSample, UnreadableIsBad
from ssljax.data.sources.base import PICTURES, Missing, OpenFiles, Record, check_index, expand, extension, nearest
from ssljax.data.tar import tar_index


@dataclass(frozen=True)
class Captions:
    """Pictures with captions: a `.csv`, `.tsv` or `.jsonl` table with a header, and a folder or tar of pictures.

    The table's `image_column` names the picture, with or without its extension and folders. `where` keeps the rows with
    these values. A row whose picture is missing is an error, or is left out with `missing="drop"`; so is the end of a
    truncated tar.

    Record: `image` (bytes), `text` (str; a tuple of str for several columns or for a JSON list), `key` (the picture's
    name).
    """

    file: str
    images: str
    image_column: str = "image"
    text_columns: tuple[str, ...] = ("caption",)
    where: Mapping[str, str] = field(default_factory=dict)
    missing: Missing = "error"

    def __post_init__(self) -> None:
        if not self.text_columns:
            raise ValueError("text_columns is empty; name the columns that hold the captions")
        _ = self._rows

    @cached_property
    def _pictures(self) -> "_FolderPictures | _TarPictures":
        path = expand(self.images)
        if path.is_dir():
            return _FolderPictures(path)
        if path.is_file():
            return _TarPictures(path, self.missing)
        raise FileNotFoundError(f"there is no folder or tar of pictures {path}")

    @cached_property
    def _rows(self) -> tuple[tuple[str, str | tuple[str, ...]], ...]:
        """(name of the picture, its text)"""
        path = expand(self.file)
        table = read_table(path)
        for column in (self.image_column, *self.text_columns, *self.where):
            # The lines of a .jsonl may leave out columns, so all of them count.
            if not any(column in row for row in table):
                columns = sorted({name for row in table[:100] for name in row})
                raise ValueError(f"{path} has no column {column!r}{nearest(column, columns)} Its columns are {columns}")
        chosen = [row for row in table if all(str(row.get(k)) == v for k, v in self.where.items())]
        if not chosen:
            raise ValueError(f"no row of {path} has {dict(self.where)}{self._values(table)}")
        rows, lost = [], []
        for row in chosen:
            name = str(row.get(self.image_column, ""))
            member = self._pictures.find(name)
            if member is None:
                lost.append(name)
            else:
                texts = [_texts(row.get(column)) for column in self.text_columns]
                rows.append((member, texts[0] if len(texts) == 1 else sum((_many(t) for t in texts), ())))
        if lost and (self.missing == "error" or not rows):
            raise ValueError(
                f"{len(lost)} of {len(chosen)} pictures in the column {self.image_column!r} of {path} are not in "
                f"{expand(self.images)}, such as {lost[:3]}. Check image_column and images, or set missing='drop'"
            )
        return tuple(rows)

    def _values(self, table: Sequence[Mapping[str, Any]]) -> str:
        seen = {k: sorted({str(row.get(k)) for row in table})[:6] for k in self.where}
        return f"; there are {seen}"

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        member, text = self._rows[check_index(index, len(self))]
        with UnreadableIsBad(member):
            return {"image": self._pictures.read(member), "text": text, "key": member}


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a .csv, .tsv or .jsonl file, by column name. Raises ValueError that names the line at fault."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    kind = extension(path.name)
    if kind not in ("csv", "tsv", "jsonl"):
        raise ValueError(f"{path}: a table is a .csv, .tsv or .jsonl file")
    rows: list[dict[str, Any]] = []
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind != "jsonl":
                reader = csv.DictReader(file, delimiter="\t" if kind == "tsv" else ",", strict=True)
                for row in reader:
                    number = reader.line_num
                    if None in row or None in row.values():
                        raise ValueError(f"it does not have the {len(reader.fieldnames or ())} cells of the header")
                    rows.append(row)
            else:
                for line in file:
                    number += 1
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise ValueError("it is not a JSON object")
                        rows.append(row)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, near line {max(number, 1)}: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _texts(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, list):
        return tuple(map(str, value))
    return "" if value is None else str(value)


def _many(text: str | tuple[str, ...]) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _by_name(names: Sequence[str]) -> dict[str, str]:
    """Every way to name a picture -> its name: in full, without extension, without folders. The fullest spelling wins;
    a short spelling that could mean several pictures means none."""
    spellings: dict[str, str] = {}
    unclear: set[str] = set()
    full = dict.fromkeys(names)
    for name in full:
        if extension(name) not in PICTURES or os.path.basename(name).startswith("."):
            continue
        base = os.path.basename(name)
        for spelling in {os.path.splitext(name)[0], base, os.path.splitext(base)[0]} - {name}:
            if spelling in full:
                continue
            if spellings.setdefault(spelling, name) != name:
                unclear.add(spelling)
    return {**{k: v for k, v in spellings.items() if k not in unclear}, **{name: name for name in full}}


class _FolderPictures:
    def __init__(self, root: Path):
        self._root = root
        self._names = _by_name(
            sorted(
                os.path.relpath(os.path.join(folder, file), root)
                for folder, _, files in os.walk(root)
                for file in files
            )
        )

    def find(self, name: str) -> str | None:
        return self._names.get(name)

    def read(self, member: str) -> bytes:
        return (self._root / member).read_bytes()


class _TarPictures:
    def __init__(self, path: Path, missing: Missing):
        index = tar_index(path, missing)
        self._path, self._index = path, index
        self._places = {name: i for i, name in enumerate(index.names)}
        self._names = _by_name(index.names)
        self._files = OpenFiles()

    def find(self, name: str) -> str | None:
        return self._names.get(name)

    def read(self, member: str) -> bytes:
        i = self._places[member]
        size = int(self._index.sizes[i])
        content = self._files.read(self._path, int(self._index.offsets[i]), size)
        if len(content) != size:
            raise BadSample(f"{member} in {self._path}: the file is shorter than when it was indexed", member)
        return content
