"""A table of captions beside pictures: `Captions`."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ssljax.bounded import parse_json, read_lines
from ssljax.data.errors import BadSample, UnreadableIsBad
from ssljax.data.sources.base import (
    PICTURES,
    Missing,
    OpenFiles,
    Record,
    check_index,
    expand,
    extension,
    nearest,
    read_picture,
    walk,
)
from ssljax.data.tar import tar_index

_SHOWN = 100  # rows, columns and values a message is made from


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
        wanted = {self.image_column, *self.text_columns, *self.where}
        columns: dict[str, None] = {}  # of the first rows; the lines of a .jsonl may leave out columns
        values: dict[str, set[str]] = {column: set() for column in self.where}
        rows, lost, chosen = [], [], 0
        for number, row in enumerate(read_table(path)):
            wanted -= row.keys()
            if number < _SHOWN:
                columns |= dict.fromkeys(row)
            for column, seen in values.items():
                if len(seen) < _SHOWN:
                    seen.add(str(row.get(column)))
            if any(str(row.get(column)) != value for column, value in self.where.items()):
                continue
            chosen += 1
            name = str(row.get(self.image_column, ""))
            if (member := self._pictures.find(name)) is None:
                lost.append(name)
                continue
            texts = [_texts(row.get(column)) for column in self.text_columns]
            rows.append((member, texts[0] if len(texts) == 1 else sum((_many(t) for t in texts), ())))
        if wanted:
            column = min(wanted)
            raise ValueError(
                f"{path} has no column {column!r}{nearest(column, columns)} Its columns are {sorted(columns)[:_SHOWN]}"
            )
        if not chosen:
            there = {column: sorted(seen)[:6] for column, seen in values.items()}
            raise ValueError(f"no row of {path} has {dict(self.where)}; there are {there}")
        if lost and (self.missing == "error" or not rows):
            raise ValueError(
                f"{len(lost)} of {chosen} pictures in the column {self.image_column!r} of {path} are not in "
                f"{expand(self.images)}, such as {lost[:3]}. Check image_column and images, or set missing='drop'"
            )
        return tuple(rows)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        member, text = self._rows[check_index(index, len(self))]
        with UnreadableIsBad(member):
            return {"image": self._pictures.read(member), "text": text, "key": member}


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .csv, .tsv or .jsonl file, by column name: texts, numbers and lists of them.

    Raises:
        ValueError: names the line at fault. Lines and JSON are bounded (`ssljax.bounded`), and so are the cells of a
        .csv (128 KiB).
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    kind = extension(path.name)
    if kind not in ("csv", "tsv", "jsonl"):
        raise ValueError(f"{path}: a table is a .csv, .tsv or .jsonl file")
    number, empty = 0, True
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind != "jsonl":
                reader = csv.DictReader(read_lines(file), delimiter="\t" if kind == "tsv" else ",", strict=True)
                for row in reader:
                    number = reader.line_num
                    if None in row or None in row.values():
                        raise ValueError(f"it does not have the {len(reader.fieldnames or ())} cells of the header")
                    empty = False
                    yield row
            else:
                for line in read_lines(file):
                    number += 1
                    if line.strip():
                        row = parse_json(line)
                        if not isinstance(row, dict):
                            raise ValueError("it is not a JSON object")
                        empty = False
                        yield {name: value for name, value in row.items() if _is_plain(value)}
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, near line {max(number, 1)}: {error}") from error
    if empty:
        raise ValueError(f"{path} has no rows")


def _is_plain(value: Any) -> bool:
    """A text, a number, None or a list of these; what is nested deeper is no caption."""
    values = value if isinstance(value, list) else (value,)
    return all(item is None or isinstance(item, str | int | float) for item in values)


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
        self._names = _by_name(sorted(walk(root)))

    def find(self, name: str) -> str | None:
        return self._names.get(name)

    def read(self, member: str) -> bytes:
        return read_picture(self._root / member, member)


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
