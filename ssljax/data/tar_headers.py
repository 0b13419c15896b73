"""The headers of a tar file, one after another: POSIX ustar and pax, and GNU's long names and large numbers.

Python's tarfile is made for extracting. It keeps an object for every member, reads pax headers of any length, follows
GNU's sparse files and, before 3.11.14, loops for ever at a negative size. An index needs none of that.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
LARGEST_HEADER = 2**20  # bytes of a pax header or long name
_CHECKSUM = slice(148, 156)


@dataclass(frozen=True, slots=True)
class Member:
    """A member as its headers describe it; its content is `size` bytes at `offset`."""

    name: str
    kind: bytes  # the type flag of POSIX: b"0" a file, b"5" a folder, others are links and devices
    offset: int
    size: int


def read_members(file: BinaryIO) -> Iterator[Member]:
    """Every member, up to the end mark (a block of zeros).

    Raises:
        tarfile.ReadError: a damaged header, a member that reaches beyond the end of the file, no end mark.
    """
    descriptor, at = file.fileno(), 0
    end = os.fstat(descriptor).st_size
    special: dict[str, bytes] = {}  # what pax and GNU headers say of the next member
    while (header := os.pread(descriptor, BLOCK, at)) != bytes(BLOCK):
        if len(header) < BLOCK:
            raise tarfile.ReadError(f"no end mark at byte {at:,}")
        kind, size = _checked(header, at)
        at += BLOCK
        if kind in b"xXgLK":
            if size > LARGEST_HEADER:
                raise tarfile.ReadError(
                    f"the header at byte {at - BLOCK:,} has {size:,} bytes, over the limit of {LARGEST_HEADER:,}"
                )
            content = os.pread(descriptor, size, at)
            if kind == b"L":
                special["path"] = content.split(b"\0", 1)[0]
            elif kind != b"K":
                said = _pax(content, at)
                special |= said if kind != b"g" else {}
        else:
            if any(name.startswith("GNU.sparse") for name in special):
                kind = b"S"
            size = _number(special["size"], 10, at) if "size" in special else size
            name = special.get("path") or _name(header)
            if kind == b"0" and name.endswith(b"/"):  # how the first tars marked folders
                kind = b"5"
            size = 0 if kind == b"5" else size
            if at + size > end:
                raise tarfile.ReadError(f"it ends within the content of {name!r}")
            yield Member(name.decode("utf-8", "backslashreplace"), kind, at, size)
            special = {}
        at += -(-size // BLOCK) * BLOCK


def _checked(header: bytes, at: int) -> tuple[bytes, int]:
    """(type, size) of a header whose checksum is right."""
    plain = header[:148] + b" " * 8 + header[156:]
    signed = sum(plain) - 256 * sum(byte > 127 for byte in plain)  # how some old tars counted
    if _number(header[_CHECKSUM], 8, at) not in (sum(plain), signed):
        raise tarfile.ReadError(f"the header at byte {at:,} is damaged")
    kind, size = header[156:157], header[124:136]
    large = size[0] == 0x80  # GNU: base 256; 0xff would be negative
    length = int.from_bytes(size[1:], "big") if large else _number(size, 8, at)
    return b"0" if kind in (b"\0", b"7") else kind, length


def _number(digits: bytes, base: int, at: int) -> int:
    text = digits.strip(b" \0") or b"0"
    if not text.isdigit() or len(text) > 20 or (base == 8 and (b"8" in text or b"9" in text)):
        raise tarfile.ReadError(f"the header at byte {at:,} is damaged: {digits!r} is no number")
    return int(text, base)


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _pax(content: bytes, at: int) -> dict[str, bytes]:
    """The records `length key=value\\n` of a pax header."""
    records, start = {}, 0
    while start < len(content) and content[start]:
        length, space, _ = content[start : start + 20].partition(b" ")
        stop = start + _number(length, 10, at)
        key, equals, value = content[start + len(length) + 1 : stop - 1].partition(b"=")
        if not space or not equals or stop <= start or stop > len(content):
            raise tarfile.ReadError(f"the pax header at byte {at:,} is damaged")
        records[key.decode("utf-8", "backslashreplace")] = value
        start = stop
    return records
