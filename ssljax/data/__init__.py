"""From files to batches: sources, the training stream, host transforms, tokenisers."""

from ssljax.data.audio import Waveform
from ssljax.data.bands import Bands
from ssljax.data.embedded import Digits
from ssljax.data.errors import BadSample
from ssljax.data.graphs import Graph, Graphs
from ssljax.data.host import HostTransform, Reader
from ssljax.data.inspect import inspect, print_summary
from ssljax.data.order import Sampling
from ssljax.data.pack import pack
from ssljax.data.packing import Packed, PackedText
from ssljax.data.pictures import decode
from ssljax.data.points import Points
from ssljax.data.scenes import Scenes
from ssljax.data.sources import (
    TFDS,
    ArrayRecord,
    Arrays,
    Captions,
    Concat,
    Folder,
    Npz,
    Parquet,
    Record,
    Source,
    Subset,
)
from ssljax.data.spec import parse_source
from ssljax.data.stream import Batches, Loader, check_bad_fraction, eval_batches, train_batches, typical_sample
from ssljax.data.tar import Tar
from ssljax.data.tokenize import ByteTokenizer, ClipBPE, SentencePiece, Tokenizer, TokenizerFile
from ssljax.data.video import Clips
from ssljax.data.volumes import Volume

__all__ = [
    "TFDS",
    "ArrayRecord",
    "Arrays",
    "BadSample",
    "Bands",
    "Batches",
    "ByteTokenizer",
    "Captions",
    "ClipBPE",
    "Clips",
    "Concat",
    "Digits",
    "Folder",
    "Graph",
    "Graphs",
    "HostTransform",
    "Loader",
    "Npz",
    "Packed",
    "PackedText",
    "Parquet",
    "Points",
    "Reader",
    "Record",
    "Sampling",
    "Scenes",
    "SentencePiece",
    "Source",
    "Subset",
    "Tar",
    "Tokenizer",
    "TokenizerFile",
    "Volume",
    "Waveform",
    "check_bad_fraction",
    "decode",
    "eval_batches",
    "inspect",
    "pack",
    "parse_source",
    "print_summary",
    "train_batches",
    "typical_sample",
]
