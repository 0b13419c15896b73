"""Hostile tar shards (also with a planted index) and npz archives, built by code: name -> (files, refusal)."""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hostile_pictures import encoded

MIB = 2**20
JPEG = encoded("JPEG")
Files = Mapping[str, bytes]  # the first is the one to read, the others lie beside it
Cases = dict[str, tuple[Callable[[], Files], str | None]]  # what the refusal must match; None: harmless

# tar -----------------------------------------------------------------------------------------------------------------


def member(
    name: bytes, content: bytes = b"", kind: bytes = b"0", size: bytes | None = None, link: bytes = b""
) -> bytes:
    """A member of a tar file with any field at all; the checksum is right."""
    digits = b"%011o\0" % len(content) if size is None else size
    head = name.ljust(100, b"\0")[:100] + b"0000644\0" + b"0000000\0" * 2 + digits + b"00000000000\0"
    tail = kind + link.ljust(100, b"\0") + b"ustar\0" + b"00" + bytes(247)
    checksum = sum(head) + 256 + sum(tail)
    return head + b"%06o\0 " % checksum + tail + content + bytes(-len(content) % 512)


def tar(*members: bytes) -> dict[str, bytes]:
    return {"a.tar": member(b"0.jpg", JPEG) + b"".join(members) + bytes(1024)}


def pax(**records: str) -> bytes:
    lines = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while length != len(str(length)) + len(rest):
            length += 1
        lines += str(length).encode() + rest
    return member(b"pax", lines, b"x")


def base256(number: int) -> bytes:
    return (number + 2**96 if number < 0 else number | 1 << 95).to_bytes(12, "big")


def planted(**arrays: Any) -> dict[str, bytes]:
    """A shard with an index beside it that has the right stamp; the test sets the shard's time to 0."""
    shard = tar()["a.tar"]
    index = {
        "stamp": np.array([2, len(shard), 0], np.int64),
        "names": np.frombuffer(b"0.jpg", np.uint8),
        "offsets": np.array([512]),
        "sizes": np.array([len(JPEG)]),
        "damage": np.zeros(0, np.uint8),
    }
    return {"a.tar": shard, "a.tar.index.npz": npz(**{**index, **arrays})}


TAR: Cases = {
    "link": (lambda: tar(member(b"1.jpg", kind=b"2", link=b"/etc/passwd")), "link or device"),
    "hard link": (lambda: tar(member(b"1.jpg", kind=b"1", link=b"0.jpg")), "link or device"),
    "device": (lambda: tar(member(b"1.jpg", kind=b"3")), "link or device"),
    "pipe": (lambda: tar(member(b"1.jpg", kind=b"6")), "link or device"),
    "absolute name": (lambda: tar(member(b"/etc/1.jpg", JPEG)), "absolute names"),
    "name with ..": (lambda: tar(member(b"a/../../1.jpg", JPEG)), "absolute names and '..'"),
    "pax name with ..": (lambda: tar(pax(path="../1.jpg"), member(b"1.jpg", JPEG)), "absolute names and '..'"),
    "long name with ..": (lambda: tar(member(b"L", b"../1.jpg\0", b"L"), member(b"1", JPEG)), "absolute names"),
    "pax name with NUL": (lambda: tar(pax(path="a\0/b.jpg"), member(b"1.jpg", JPEG)), "absolute names"),
    "name not UTF-8": (lambda: tar(member(b"\xff\xfe\n\x1b[31m.jpg", JPEG)), None),
    "pax header of 8 GiB": (lambda: tar(member(b"x", b"", b"x", base256(2**33))), "over the limit"),
    "pax header of 2 MiB": (lambda: tar(pax(comment="a" * 2 * MIB)), "over the limit"),
    "pax record too long": (lambda: tar(member(b"x", b"999999 path=a\n", b"x")), "damaged"),
    "pax record of length 0": (lambda: tar(member(b"x", b"0 path=a\n" * 9, b"x")), "damaged"),
    "pax sparse": (lambda: tar(pax(**{"GNU.sparse.major": "1", "GNU.sparse.realsize": str(2**50)}),
                               member(b"1.jpg", JPEG)), "link or device"),
    "old sparse": (lambda: tar(member(b"1.jpg", JPEG, b"S")), "link or device"),
    "long names in a row": (lambda: tar(*[member(b"L", b"a" * 5000, b"L")] * 100, member(b"1.jpg", JPEG)), None),
    "negative size": (lambda: tar(member(b"1.jpg", size=base256(-512))), "damaged"),
    "size of 2^80": (lambda: tar(member(b"1.jpg", size=base256(2**80))), "truncated"),
    "pax size of 2^60": (lambda: tar(pax(size=str(2**60)), member(b"1.jpg", JPEG)), "truncated"),
    "size that is no number": (lambda: tar(member(b"1.jpg", size=b"+1_0e\0      ")), "damaged"),
    "20,000 empty members": (lambda: tar(*[member(b"%d.jpg" % i) for i in range(1, 20_000)]), "0 bytes"),
    "label of 3,000 digits": (lambda: tar(member(b"0.cls", b"9" * 5000)), "cannot read its label"),
    "json nested 100,000 deep": (lambda: tar(member(b"0.json", b"[" * 100_000)), "nested too deeply"),
    "json of 5 MiB": (lambda: tar(member(b"0.json", b'{"a":' + b"[{}," * MIB + b"0]}")), "over the limit"),
    "json with a huge int": (lambda: tar(member(b"0.json", b'{"a":' + b"9" * 10_000 + b"}")), "cannot read its json"),
    "index with offsets outside": (lambda: planted(offsets=np.array([2**40])), None),
    "index with negative offsets": (lambda: planted(offsets=np.array([-512])), None),
    "index with sizes outside": (lambda: planted(sizes=np.array([2**62])), None),
    "index with sizes that overflow": (lambda: planted(offsets=np.array([1024]), sizes=np.array([2**63 - 1])), None),
    "index of floats": (lambda: planted(offsets=np.array([1e300])), None),
    "index of another shape": (lambda: planted(offsets=np.zeros((1, 1), np.int64)), None),
    "index with ..": (lambda: planted(names=np.frombuffer(b"../0.jpg", np.uint8)), None),
    "index with pickles": (lambda: planted(extra=np.array([EXPLOSIVE], object)), None),
    "index that is a bomb": (lambda: planted(extra=np.zeros(2**27, np.uint8)), None),
    "index of garbage": (lambda: {**tar(), "a.tar.index.npz": b"PK\3\4" + bytes(100)}, None),
}  # fmt: skip

# npz -----------------------------------------------------------------------------------------------------------------


class _Explosive:
    def __reduce__(self):
        return os.system, ("touch exploded",)


EXPLOSIVE = _Explosive()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=True, **arrays)
    return file.getvalue()


def npy(descr: str = "'|u1'", shape: str = "(1, 2, 2)", body: bytes = bytes(4), fortran: str = "False") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + body


def zipped(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> dict[str, bytes]:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return {"a.npz": file.getvalue()}


def one(content: bytes) -> dict[str, bytes]:
    return zipped({"images.npy": content})


def patched(at_mark: bytes, offset: int, value: bytes) -> dict[str, bytes]:
    """A sound archive with bytes changed behind every occurrence of a mark."""
    data = bytearray(one(npy())["a.npz"])
    at = data.find(at_mark)
    while at >= 0:
        data[at + offset : at + offset + len(value)] = value
        at = data.find(at_mark, at + 1)
    return {"a.npz": bytes(data)}


def twice() -> dict[str, bytes]:
    data = zipped({"images.npy": npy(), "imagez.npy": npy()})["a.npz"]
    return {"a.npz": data.replace(b"imagez", b"images")}


def code_point(number: int, order: str) -> np.ndarray:
    return np.array([number], f"{order}u4").view(f"{order}U1")


def many_members(count: int) -> dict[str, bytes]:
    """A list of members that are not there: 46 bytes each."""
    entry = b"PK\1\2" + bytes(42)
    return {"a.npz": entry * count + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 46 * count, 0, 0)}


_OK = {"images": np.zeros((3, 4, 4), np.uint8)}
NPZ: Cases = {
    "pickled objects": (lambda: {"a.npz": npz(images=np.array([EXPLOSIVE], object))}, "pickled objects"),
    "pickled labels": (lambda: {"a.npz": npz(**_OK, labels=np.array([EXPLOSIVE] * 3, object))}, "pickled objects"),
    "text beyond Unicode": (lambda: {"a.npz": npz(**_OK, class_names=code_point(2**21, "<"))}, "Unicode"),
    "half of a character": (lambda: {"a.npz": npz(**_OK, class_names=code_point(0xD800, ">"))}, "Unicode"),
    "a pickle": (lambda: {"a.npz": pickle.dumps(EXPLOSIVE)}, "pickled objects"),
    "a pickle as member": (lambda: one(pickle.dumps(EXPLOSIVE)), "magic"),
    "zip bomb": (lambda: one(npy(shape="(1, 8192, 16384)", body=bytes(2**27))), "unpack to"),
    "bzip2 bomb": (lambda: zipped({"images.npy": npy(body=bytes(2**26))}, zipfile.ZIP_BZIP2), "unpack to|announces"),
    "LZMA bomb": (lambda: zipped({"images.npy": npy(body=bytes(2**26))}, zipfile.ZIP_LZMA), "unpack to|announces"),
    "shape of 2^40": (lambda: one(npy(shape="(1099511627776, 2, 2)")), "announces"),
    "shape of 2^40 and 0": (lambda: one(npy(shape="(1099511627776, 0, 2)", body=b"")), "shape"),
    "shape that overflows": (lambda: one(npy(shape="(4294967296, 4294967297, 4294967296)")), "announces"),
    "negative shape": (lambda: one(npy(shape="(-1, -2, 2)")), "announces"),
    "shape of floats": (lambda: one(npy(shape="(1.0, 2, 2)")), "not a complete"),
    "shape of bools": (lambda: one(npy(shape="(True, 2, 2)")), "not a complete"),
    "header of 60,000 signs": (lambda: one(npy(shape="(" + "-" * 60_000 + "1,)")), "not a complete"),
    "header of nested brackets": (lambda: one(npy(shape="(" * 4_000 + ")" * 4_000)), "not a complete"),
    "header of version 2, 4 GiB": (lambda: one(b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(1000)), "not a complete"),
    "header of version 9": (lambda: one(b"\x93NUMPY\x09\0" + bytes(1000)), "version"),
    "header that is code": (lambda: one(npy(shape="__import__('os').system('touch exploded')")), "not a complete"),
    "structured type": (lambda: one(npy("[('a', '|u1'), ('b', '|O')]", "(1,)")), "pickled objects"),
    "void type": (lambda: one(npy("'|V4'", "(1, 1, 1)")), "holds"),
    "strings without length": (lambda: one(npy("'|S0'", "(1099511627776, 1, 1)", b"")), "holds"),
    "columns first": (lambda: one(npy(shape="(1, 2, 2)", fortran="True")), None),
    "name with ..": (lambda: zipped({"images.npy": npy(), "../../up.npy": npy()}), None),
    "same name twice": (twice, "share a name"),
    "encrypted": (lambda: patched(b"PK\1\2", 8, b"\1\0"), "encrypted|complete"),
    "unknown compression": (lambda: patched(b"PK\1\2", 10, b"\x5d\0"), "compress"),
    "member larger than it says": (lambda: patched(b"PK\1\2", 24, b"\x81\0\0\0"), "announces|complete"),
    "member of 4 GiB": (lambda: patched(b"PK\1\2", 24, b"\xfe\xff\xff\xff"), "unpack to"),
    "list of 2^32 bytes": (lambda: patched(b"PK\5\6", 12, b"\xfe\xff\xff\xff"), "complete"),
    "list of 500,000 members": (lambda: many_members(500_000), "list of members"),
    "an .npy file": (lambda: {"a.npz": npy(shape="(1099511627776,)")}, "single .npy"),
    "empty": (lambda: {"a.npz": b""}, "complete"),
    "labels of text": (lambda: {"a.npz": npz(**_OK, labels=np.array(["a", "b", "c"]))}, "one row of integers"),
    "labels in two rows": (lambda: {"a.npz": npz(**_OK, labels=np.zeros((3, 2), int))}, "labels"),
    "labels of 64 bits": (lambda: {"a.npz": npz(**_OK, labels=np.full(3, 2**40))}, "32 bits"),
    "offsets of floats": (lambda: {"a.npz": npz(jpeg=np.zeros(9, np.uint8), offsets=np.array([0, np.nan]))}, "rising"),
    "offsets that fall": (lambda: {"a.npz": npz(jpeg=np.zeros(9, np.uint8), offsets=np.array([0, 5, 2]))}, "rising"),
    "offsets outside": (lambda: {"a.npz": npz(jpeg=np.zeros(9, np.uint8), offsets=np.array([0, 2**62]))}, "reach byte"),
    "unsigned offsets": (lambda: {"a.npz": npz(jpeg=np.zeros(9, np.uint8), offsets=np.array([2**64 - 1, 3], "u8"))},
                         "rising"),
    "a million tiny images": (lambda: {"a.npz": npz(images=np.zeros((2**20, 1, 1), np.uint8))}, None),
}  # fmt: skip
