"""Which files hold what, and how they are opened: pictures, videos, sounds, volumes, point clouds."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ssljax.bounded import LARGEST_RECORD, plain_size
from ssljax.data.errors import BadSample
from ssljax.data.fields import shown

MEDIA: Mapping[str, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif"),
    "video": ("mp4", "m4v", "mkv", "webm", "mov", "avi", "mpg", "mpeg"),
    "audio": ("wav", "flac", "ogg", "oga", "opus", "mp3", "aiff", "aif"),
    "volume": ("npy", "nii", "nii.gz"),
    "points": ("ply",),
    "arrays": ("npz",),
}
"""Entry of a record -> endings of the files that hold it. The entries of an npz archive become those of the record."""


def media_kind(name: str) -> str | None:
    """`scan.nii.gz` -> `volume`; None for a file of no known kind."""
    name = name.lower()
    return next((kind for kind, endings in MEDIA.items() if name.endswith(tuple(f".{e}" for e in endings))), None)


def open_media(value: Any, what: str) -> BinaryIO:
    """A value of a record, encoded bytes or the path of a file, to be read from.

    Raises:
        BadSample: neither of them; nothing in it; a pipe or device.
        OSError: a file that is missing or unreadable.
    """
    if isinstance(value, Path):
        try:
            size = plain_size(value)
        except ValueError as error:
            raise BadSample(str(error)) from error
        if size:
            return open(value, "rb")
    elif not isinstance(value, bytes):
        raise BadSample(f"{what!r} is {shown(value)}; expected the bytes of a file, or its path")
    elif value:
        return io.BytesIO(value)
    raise BadSample("0 bytes")


def read_media(value: Any, what: str, most: int = LARGEST_RECORD) -> bytes:
    """All bytes of such a value, at most `most`. Raises as `open_media`, and BadSample for a file of more."""
    if isinstance(value, bytes):
        return value
    with open_media(value, what) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise BadSample(f"{value} has more than {most:,} bytes")
    return content


@contextmanager
def undecodable_is_bad() -> Iterator[None]:
    """`with` it, whatever a codec raises becomes BadSample; BadSample, a failing disk and full memory stay."""
    try:
        yield
    except BadSample:
        raise
    except Exception as error:
        from_codec = type(error).__module__.startswith("av.")  # FFmpeg's errors pass for OSError, MemoryError, ...
        if isinstance(error, OSError | MemoryError) and not from_codec:
            raise
        raise BadSample(f"cannot be decoded: {error}") from error
