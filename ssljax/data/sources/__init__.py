"""Where samples come from. A source is a random-access sequence of records; see `base.Source`."""

from ssljax.data.sources.arrays import Arrays, Concat, Npz, Subset
from ssljax.data.sources.base import Record, Source
from ssljax.data.sources.captions import Captions
from ssljax.data.sources.folder import Folder
from ssljax.data.sources.parquet import Parquet
from ssljax.data.sources.shards import ArrayRecord
from ssljax.data.sources.tfds import TFDS

__all__ = [
    "TFDS",
    "ArrayRecord",
    "Arrays",
    "Captions",
    "Concat",
    "Folder",
    "Npz",
    "Parquet",
    "Record",
    "Source",
    "Subset",
]
