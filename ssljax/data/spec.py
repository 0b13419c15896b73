"""Sources in one word, for the command line: `parse_source("folder:~/pictures")`."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssljax.data.embedded import Digits
from ssljax.data.graphs import Graphs
from ssljax.data.scenes import Scenes
from ssljax.data.sources.arrays import Npz
from ssljax.data.sources.base import Source, expand, extension, nearest
from ssljax.data.sources.captions import Captions, read_table
from ssljax.data.sources.folder import Folder
from ssljax.data.sources.parquet import Parquet
from ssljax.data.sources.shards import ArrayRecord
from ssljax.data.sources.tfds import TFDS
from ssljax.data.tar import Tar

_IMAGE_COLUMNS = ("image", "file", "filename", "file_name", "image_path", "path", "id", "key")
_TEXT_COLUMNS = ("caption", "captions", "text", "title", "sentence", "description", "en")


def parse_source(spec: str) -> Source:
    """The source that `scheme:what` names, with its defaults.

    `folder:DIR`, `tar:a-{000..009}.tar`, `arrayrecord:DIR`, `parquet:DIR`, `npz:FILE`, `graphs:FILE`,
    `tfds:NAME/SPLIT`, `captions:TABLE` (pictures and columns are guessed), `digits:SPLIT`, `scenes:SPLIT`.

    Raises:
        ValueError: unknown scheme, or a guess that is not clear.
    """
    scheme, colon, what = spec.partition(":")
    if not colon and scheme in ("digits", "scenes"):
        what = "train"
    elif not colon or scheme not in _SCHEMES:
        hint = f"; did you mean 'folder:{spec}'?" if expand(spec).is_dir() else nearest(scheme, _SCHEMES)
        raise ValueError(f"{spec!r} does not start with a known kind of source, one of {', '.join(_SCHEMES)}:...{hint}")
    if not what:
        raise ValueError(f"{spec!r} says nothing after the colon; write for example {_EXAMPLES[scheme]!r}")
    return _SCHEMES[scheme](what)


def _tfds(what: str) -> TFDS:
    name, _, split = what.partition("/")
    return TFDS(name, split or "train")


def _digits(split: Any) -> Digits:  # the class checks the split
    return Digits(split)


def _scenes(split: Any) -> Scenes:
    return Scenes(split=split)


def _captions(what: str) -> Captions:
    table = expand(what)
    columns = {name for row in itertools.islice(read_table(table), 100) for name in row}
    image = next((name for name in _IMAGE_COLUMNS if name in columns), None)
    text = next((name for name in _TEXT_COLUMNS if name in columns), None)
    if image is None or text is None:
        wanted = f"a picture ({', '.join(_IMAGE_COLUMNS)})" if image is None else f"a text ({', '.join(_TEXT_COLUMNS)})"
        raise ValueError(
            f"{table} has no column with a usual name for {wanted}; its columns are {sorted(columns)}. {_USE_CLASS}"
        )
    return Captions(what, str(_pictures_beside(table)), image, (text,))


def _pictures_beside(table: Path) -> Path:
    """A folder or tar named `images` or like the table, or the only one there is, or the table's own folder."""
    beside = sorted(table.parent.iterdir())
    for name in ("images", "imgs", "pictures", "photos", table.stem):
        for path in (table.parent / name, table.parent / f"{name}.tar"):
            if path in beside:
                return path
    tars = [path for path in beside if extension(path.name) == "tar"]
    folders = [path for path in beside if path.is_dir() and not path.name.startswith(".")]
    if len(tars + folders) > 1:
        names = [path.name for path in tars + folders]
        raise ValueError(f"cannot tell which of {names} holds the pictures of {table}. {_USE_CLASS}")
    return (tars + folders + [table.parent])[0]


_USE_CLASS = "Use the class ssljax.data.Captions and say which"

_SCHEMES: Mapping[str, Callable[[str], Source]] = {
    "folder": Folder,
    "tar": Tar,
    "arrayrecord": ArrayRecord,
    "parquet": Parquet,
    "npz": Npz,
    "graphs": Graphs,
    "tfds": _tfds,
    "captions": _captions,
    "digits": _digits,
    "scenes": _scenes,
}

_EXAMPLES = {
    "folder": "folder:~/pictures",
    "tar": "tar:shards/train-{000..009}.tar",
    "arrayrecord": "arrayrecord:packed/train",
    "parquet": "parquet:data/train",
    "npz": "npz:train.npz",
    "graphs": "graphs:cora.npz",
    "tfds": "tfds:cifar10/train",
    "captions": "captions:captions.csv",
    "digits": "digits:train",
    "scenes": "scenes:train",
}
