"""What an encoded picture announces, held to caps before a decoder sees it.

Decoders believe headers: a hundred bytes make them allocate gigabytes, a megabyte keeps them busy for minutes. So
sizes, scans and blocks are counted here first, and of the formats made of chunks only those are passed on that hold the
pixels of the first frame: neither compressed texts and profiles nor the other frames are ever looked at.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ssljax.data.errors import BadSample

MAX_SIDE = 65_535  # pixels, as in JPEG and GIF; decoders hold whole rows, and read them in quadratic time
FREE_PIXELS = 10_000_000  # a page at 300 dpi: below 200 MiB in the hungriest decoder (WebP, 18 bytes a pixel)
PIXELS_PER_BYTE = 128  # of larger pictures, at most; photographs have 2 to 20, pages of text about 50
MAX_SCANS = 64  # of a JPEG: each may touch every coefficient again; encoders write 10 to 20
MAX_BLOCKS = 4_096  # chunks, segments, strips, and one more for every KiB of the file: each costs a step in Python

# None, CCITT, LZW, JPEG, deflate (two numbers), PackBits. Not LZMA and Zstandard, whose dictionaries have any size.
_TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946)
_TIFF_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # bytes a value
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # restarts, stuffed zeros and fill bytes are no segments
_ORIENTATION = 0x0112

Chunk = tuple[bytes, int, int]  # kind, start, stop


@dataclass(frozen=True)
class Announced:
    """An encoded picture whose header keeps within the caps."""

    format: str
    width: int
    height: int
    data: bytes  # what the decoder gets
    orientation: int = 1  # EXIF, 1 to 8
    channels: int = 3  # of a JPEG


def announced(data: bytes, max_pixels: int) -> Announced:
    """Reads the header of a JPEG, PNG, WebP, GIF, BMP or TIFF.

    Raises:
        BadSample: another format; cut within its header; larger than `max_pixels` or another cap, which it names.
    """
    name, read = next(((name, read) for magic, name, read in _FORMATS if data.startswith(magic)), (None, None))
    if name is None or read is None:
        raise BadSample(f"not an image (starts with {data[:8]!r}); JPEG, PNG, WebP, GIF, BMP and TIFF are read")
    try:
        header = read(data)
    except (IndexError, struct.error) as error:
        raise BadSample(f"truncated {name}") from error
    _check_size(header.width, header.height, len(data), max_pixels)
    return header


def _check_size(width: int, height: int, size: int, max_pixels: int) -> None:
    pixels = width * height
    if pixels > max_pixels:
        raise BadSample(f"{width}x{height} pixels is over the limit of {max_pixels:,}")
    if max(width, height) > MAX_SIDE:
        raise BadSample(f"{width}x{height} pixels: a side is longer than the limit of {MAX_SIDE:,}")
    if pixels > max(FREE_PIXELS, PIXELS_PER_BYTE * size):
        raise BadSample(
            f"{width}x{height} pixels in {size:,} bytes are too few bytes: pictures of more than {FREE_PIXELS:,} "
            f"pixels need one for every {PIXELS_PER_BYTE}"
        )


def _check_blocks(count: int, size: int, what: str) -> None:
    if count > MAX_BLOCKS + size // 1024:
        raise BadSample(f"more than {MAX_BLOCKS + size // 1024:,} blocks ({what}) in {size:,} bytes")


# JPEG (ITU-T T.81, annex B) ------------------------------------------------------------------------------------------


def _jpeg(data: bytes) -> Announced:
    at, scans, blocks, frame, sequential, orientation = 2, 0, 0, None, False, 1
    while (found := _JPEG_MARKER.search(data, at)) is not None:
        marker, at = data[found.end() - 1], found.end()
        if marker == 0xD9:  # what follows the end is no business of a decoder
            break
        if marker in (0x01, 0xD8):  # without a length
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if frame is not None:
                raise BadSample("corrupt JPEG: two headers")
            if marker > 0xC2:
                raise BadSample(f"a JPEG of the kind SOF{marker - 0xC0} (lossless or arithmetic coding) is not read")
            frame, sequential = struct.unpack_from(">HHB", data, at + 3), marker < 0xC2
        elif marker == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise BadSample(f"a JPEG of more than {MAX_SCANS} scans")
            if sequential and frame is not None and data[at + 2] == frame[2]:
                break  # the only one that a decoder accepts, with all channels: no need to look for more
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", at + 2):
            orientation = _orientation(data[at + 8 : at + length])
        at += length
        blocks += 1
        _check_blocks(blocks, len(data), "segments")
    if frame is None or not scans:
        raise BadSample("truncated JPEG")
    height, width, channels = frame
    return Announced("JPEG", width, height, data, orientation, channels)


# PNG (ISO 15948, clause 5) -------------------------------------------------------------------------------------------


def _png(data: bytes) -> Announced:
    width, height = struct.unpack_from(">II", data, 16)
    view, once, kept, orientation = memoryview(data), {b"IHDR", b"PLTE", b"tRNS"}, [], 1
    for kind, start, stop in _png_chunks(data):
        if kind == b"IDAT" or kind == b"IEND" or kind in once:
            kept.append(view[start:stop])
            once.discard(kind)
        elif kind == b"eXIf":
            orientation = _orientation(data[start + 8 : stop - 4])
    return Announced("PNG", width, height, b"".join([view[:8], *kept]), orientation)


def _png_chunks(data: bytes) -> Iterator[Chunk]:
    at, blocks = 8, 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at, at + 12 + length
        if kind == b"IEND":
            return
        at += 12 + length
        blocks += 1
        _check_blocks(blocks, len(data), "chunks")


# WebP (RFC 9649) -----------------------------------------------------------------------------------------------------


def _webp(data: bytes) -> Announced:
    sizes, kept, orientation = [], [], 1
    for kind, start, stop in _webp_chunks(data):
        body = data[start + 8 : start + 24]
        if kind == b"EXIF":
            orientation = _orientation(data[start + 8 : stop].removeprefix(b"Exif\0\0"))
        elif kind in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(data[start:stop])
        if kind in (b"VP8X", b"ANMF"):
            first = 4 if kind == b"VP8X" else 6
            sides = body[first : first + 3], body[first + 3 : first + 6]
            sizes.append([1 + int.from_bytes(side, "little") for side in sides])
        elif kind == b"VP8L":
            bits = int.from_bytes(body[1:5], "little")
            sizes.append([1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)])
        elif kind == b"VP8 ":
            sizes.append([side & 0x3FFF for side in struct.unpack_from("<HH", body, 6)])
        if kind == b"ANMF":  # the first frame
            break
    if data[8:12] != b"WEBP" or not sizes:
        raise BadSample(f"not an image (a RIFF file that holds {data[8:16]!r})")
    content = b"WEBP" + b"".join(kept)
    width, height = (max(sides) for sides in zip(*sizes, strict=True))
    return Announced("WebP", width, height, b"RIFF" + struct.pack("<I", len(content)) + content, orientation)


def _webp_chunks(data: bytes) -> Iterator[Chunk]:
    at, blocks, end = 12, 0, 8 + int.from_bytes(data[4:8], "little")
    if end > len(data) + 1:  # the last byte may be padding
        raise BadSample("truncated WebP")
    while at + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length > end:
            raise BadSample(f"corrupt WebP: the chunk {kind!r} is longer than the file")
        length += length % 2
        yield kind, at, at + 8 + length
        at += 8 + length
        blocks += 1
        _check_blocks(blocks, len(data), "chunks")


# GIF (version 89a) ---------------------------------------------------------------------------------------------------


def _gif(data: bytes) -> Announced:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << 1 + (flags & 7) if flags & 0x80 else 0)
    head, control, blocks = data[:at], b"", 0
    while data[at] == ord("!"):
        start, at = at, at + 2
        while data[at]:
            at += 1 + data[at]
            blocks += 1
            _check_blocks(blocks, len(data), "extensions")
        at += 1
        blocks += 1
        _check_blocks(blocks, len(data), "extensions")
        if data[start + 1] == 0xF9:  # says which colour is transparent
            control = data[start:at]
    if data[at] != ord(","):
        raise BadSample("corrupt GIF: no picture")
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, at + 1)
    return Announced("GIF", max(width, left + frame_width), max(height, top + frame_height), head + control + data[at:])


# BMP and TIFF --------------------------------------------------------------------------------------------------------


def _bmp(data: bytes) -> Announced:
    if data[14] == 12:  # the header of OS/2
        width, height = struct.unpack_from("<HH", data, 18)
        return Announced("BMP", width, height, data)
    width, height, compression = struct.unpack_from("<Ii4xI", data, 18)
    if compression in (1, 2):
        raise BadSample("a BMP with run-length encoding is not read")
    return Announced("BMP", width, abs(height), data)


def _tiff(data: bytes) -> Announced:
    tags = _tiff_tags(data)
    width, height = (tags[tag][2] if tag in tags else 0 for tag in (256, 257))
    claimed = sum(count * _TIFF_TYPES.get(kind, 0) for kind, count, _ in tags.values())
    if claimed > len(data):
        raise BadSample(f"corrupt TIFF: its tags claim {claimed:,} of {len(data):,} bytes")
    for kind, count, _ in tags.values():
        if _TIFF_TYPES.get(kind, 0) > 1:
            _check_blocks(count, len(data), "TIFF strips or tiles")
    if 259 in tags and (compression := tags[259][2]) not in _TIFF_COMPRESSIONS:
        raise BadSample(f"a TIFF with compression {compression} is not read")
    if 322 in tags and 323 in tags:  # tiles may be larger than the picture, and are decoded in full
        width, height = max(width, tags[322][2]), max(height, tags[323][2])
    return Announced("TIFF", width, height, data)  # Pillow applies the orientation itself


def _tiff_tags(data: bytes) -> dict[int, tuple[int, int, int]]:
    """Tag -> (type, count, value if there is only one), of the first directory (TIFF 6.0, section 2)."""
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    (at,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, at)
    tags: dict[int, tuple[int, int, int]] = {}
    for entry in range(at + 2, at + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", data, entry)
        (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, entry + 8)
        tags.setdefault(tag, (kind, count, value))
    return tags


def _orientation(exif: bytes) -> int:
    """1 to 8; 1 where there is none. Cameras write broken EXIF blocks beside sound pictures."""
    try:
        kind, _, value = _tiff_tags(exif).get(_ORIENTATION, (3, 1, 1))
    except (KeyError, IndexError, struct.error):
        return 1
    return value if kind == 3 and 1 <= value <= 8 else 1


_FORMATS: tuple[tuple[bytes, str, Callable[[bytes], Announced]], ...] = (
    (b"\xff\xd8\xff", "JPEG", _jpeg),
    (b"\x89PNG\r\n\x1a\n", "PNG", _png),
    (b"RIFF", "WebP", _webp),
    (b"GIF8", "GIF", _gif),
    (b"BM", "BMP", _bmp),
    (b"II*\0", "TIFF", _tiff),
    (b"MM\0*", "TIFF", _tiff),
)
