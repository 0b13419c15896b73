"""Hostile pictures, built by code: headers that lie, bombs, loops. `PICTURES`: name -> (bytes, what refuses them)."""

import io
import struct
import zlib
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

Built = Callable[[], bytes]


def encoded(form: str, width: int = 48, height: int = 40, mode: str = "RGB", **options) -> bytes:
    """A sound picture."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([y * 5 % 256, x * 5 % 256, (x * y) % 256], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, form, **options)
    return file.getvalue()


# PNG -----------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def ihdr(width: int, height: int, bits: int = 8, colours: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))


def png(*chunks: bytes, width: int = 4, height: int = 4, pixels: bytes | None = None) -> bytes:
    """A black RGB picture with `chunks` between its header and its pixels."""
    rows = zlib.compress(bytes(height * (1 + 3 * width)), 9) if pixels is None else pixels
    tail = chunk(b"IDAT", rows) + chunk(b"IEND")
    return b"\x89PNG\r\n\x1a\n" + ihdr(width, height) + b"".join(chunks) + tail


def zeros(size: int) -> bytes:
    """So many zeros, deflated: a thousandth of them."""
    deflate = zlib.compressobj(9)
    block = bytes(2**20)
    return b"".join([deflate.compress(block[: min(2**20, size - i)]) for i in range(0, size, 2**20)]) + deflate.flush()


# JPEG ----------------------------------------------------------------------------------------------------------------


def segment(marker: int, body: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    at = next(at for sof in (0xC0, 0xC2) if (at := data.find(bytes([0xFF, sof]))) > 0)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def many_scans(side: int, count: int) -> bytes:
    """A progressive JPEG that refines the same coefficients again and again, 18 bytes a time."""
    data = encoded("JPEG", side, side, "L", progressive=True)
    table = segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")  # one code word: the next 2^14 blocks are zero
    scan = segment(0xDA, bytes([1, 1, 0, 1, 63, 0x10])) + bytes(8)
    return data[:-2] + table + scan * count + b"\xff\xd9"


def exif_jpeg(tiff: bytes) -> bytes:
    data = encoded("JPEG")
    return data[:2] + segment(0xE1, b"Exif\0\0" + tiff) + data[2:]


# GIF, WebP, BMP ------------------------------------------------------------------------------------------------------


def gif(screen: tuple[int, int], frame: tuple[int, int], before: bytes = b"", frames: int = 1) -> bytes:
    image = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\0"
    palette = b"\0\0\0\xff\xff\xff"
    return b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + palette + before + image * frames + b";"


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def vp8x(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    return b"VP8X", bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def webp_pixels(width: int, height: int, lossless: bool = True) -> tuple[bytes, bytes]:
    """The one chunk of a still, black WebP."""
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "WEBP", lossless=lossless, method=0)
    data = file.getvalue()
    return data[12:16], data[20 : 20 + int.from_bytes(data[16:20], "little")]


def webp_animation(canvas: tuple[int, int], count: int) -> bytes:
    kind, pixels = webp_pixels(4, 4)
    inner = kind + struct.pack("<I", len(pixels)) + pixels + b"\0" * (len(pixels) % 2)
    frame = bytes(6) + b"\x03\0\0\x03\0\0" + bytes(4) + inner
    return riff(vp8x(*canvas, flags=2), (b"ANIM", bytes(6)), *[(b"ANMF", frame)] * count)


def bmp(width: int, height: int, bits: int = 24, compression: int = 0, body: bytes = b"", colours: int = 0) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, colours, 0)
    palette = bytes(range(8)) * 128 if bits == 8 else b""
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + len(palette)) + header + palette + body


# TIFF ----------------------------------------------------------------------------------------------------------------

Tag = tuple[int, int, int, int]  # tag, type (3 short, 4 long), count, value or offset


def tiff(tags: Iterable[Tag], body: bytes = b"", following: int = 0, count: int | None = None) -> bytes:
    """`body` begins at byte 8, the directory follows it."""
    tags = sorted(tags)
    entries = b"".join(
        struct.pack("<HHI", tag, kind, n) + (struct.pack("<HH", v, 0) if kind == 3 else struct.pack("<I", v))
        for tag, kind, n, v in tags
    )
    head = b"II*\0" + struct.pack("<I", 8 + len(body)) + body
    return head + struct.pack("<H", len(tags) if count is None else count) + entries + struct.pack("<I", following)


def grey(width: int, height: int, size: int, **changes: Tag | None) -> list[Tag]:
    """The tags of a grey picture of one strip at byte 8; `changes` replaces tags by name or drops them."""
    tags: dict[str, Tag | None] = {
        "width": (256, 4, 1, width),
        "height": (257, 4, 1, height),
        "bits": (258, 3, 1, 8),
        "compression": (259, 3, 1, 1),
        "photometric": (262, 3, 1, 1),
        "offsets": (273, 4, 1, 8),
        "samples": (277, 3, 1, 1),
        "rows": (278, 4, 1, height),
        "counts": (279, 4, 1, size),
        **changes,
    }
    return [tag for tag in tags.values() if tag is not None]


def tiled(width: int, height: int, tile: tuple[int, int], compression: int, body: bytes, bits: int = 8) -> bytes:
    tags = grey(width, height, len(body), bits=(258, 3, 1, bits), compression=(259, 3, 1, compression), offsets=None,
                rows=None, counts=None)  # fmt: skip
    tags += [(322, 4, 1, tile[0]), (323, 4, 1, tile[1]), (324, 4, 1, 8), (325, 4, 1, len(body))]
    return tiff(tags + ([(339, 3, 1, 3)] if bits == 32 else []), body)


def many_tags(size: int) -> bytes:
    """A directory of 65,000 tags that all point to the same bytes."""
    return tiff(grey(4, 4, 16) + [(33_000 + i % 32_000, 7, size, 8) for i in range(32_000)], bytes(size))


def jpeg_in_tiff() -> bytes:
    inner = with_jpeg_size(encoded("JPEG", 16, 16, "L"), 65_000, 65_000)
    return tiff(grey(16, 16, len(inner), compression=(259, 3, 1, 7)), inner)


OVER, THIN, SIDE, CORRUPT = "over the limit of", "too few bytes", "longer than", "corrupt|truncated"

PICTURES: dict[str, tuple[Built, str | None]] = {
    # what each reader must say; None: it may be read, quickly and in little memory
    "empty": (lambda: b"", "0 bytes"),
    **{f"only the magic {m[:4]!r}": (lambda m=m: m, CORRUPT) for m in
       (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*")},
    "one byte": (lambda: b"\xff", "not an image"),
    "only RIFF": (lambda: b"RIFF", "truncated"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) (r) file", "not an image"),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "not an image"),
    # PNG
    "png 2^31 wide": (lambda: png(width=2**31 - 1, height=2**31 - 1, pixels=b""), OVER),
    "png of one endless row": (lambda: png(width=2**25, height=1, pixels=zeros(3 * 2**25)), SIDE),
    "png pixel bomb": (lambda: png(width=7900, height=7900, pixels=zeros(7900 * 7900 * 3)), THIN),
    "png with two headers": (lambda: png(ihdr(20_000, 20_000)), None),
    "png zTXt bomb": (lambda: png(chunk(b"zTXt", b"a\0\0" + zeros(2**27))), None),
    "png 60 iTXt bombs": (lambda: png(*[chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(2**20 - 9))] * 60), None),
    "png 1500 iCCP bombs": (lambda: png(*[chunk(b"iCCP", b"a\0\0" + zeros(2**20 - 9))] * 1500), None),
    "png 300,000 empty chunks": (lambda: png(chunk(b"IDAT") * 300_000), "blocks"),
    "png 300,000 private chunks": (lambda: png(chunk(b"prVt") * 300_000), "blocks"),
    "png endless IDAT": (lambda: png(pixels=zeros(2**27)), None),
    "png chunk of 4 GiB": (lambda: png(b"\xff\xff\xff\xfftEXtab"), CORRUPT),
    "png eXIf with 32,000 tags": (lambda: png(chunk(b"eXIf", many_tags(100_000))), None),
    "apng of 2^31 frames": (lambda: png(chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))), None),
    "png palette too long": (lambda: png(chunk(b"PLTE", bytes(3 * 5000))), None),
    # JPEG
    "jpeg 65,535 x 65,535": (lambda: with_jpeg_size(encoded("JPEG"), 65_535, 65_535), OVER),
    "jpeg coefficient bomb": (lambda: with_jpeg_size(encoded("JPEG", progressive=True), 7900, 7900), THIN),
    "jpeg without height": (lambda: with_jpeg_size(encoded("JPEG"), 40, 0), CORRUPT),
    "jpeg 20,000 scans": (lambda: many_scans(2000, 20_000), "scans"),
    "jpeg 400,000 comments": (lambda: encoded("JPEG")[:2] + b"\xff\xfe\0\2" * 400_000 + encoded("JPEG")[2:], "blocks"),
    "jpeg arithmetic": (lambda: encoded("JPEG").replace(b"\xff\xc0", b"\xff\xc9"), "SOF9|coding"),
    "jpeg lossless": (lambda: encoded("JPEG").replace(b"\xff\xc0", b"\xff\xc3"), "SOF3|coding"),
    "jpeg two headers": (lambda: encoded("JPEG").replace(b"\xff\xda", with_jpeg_size(encoded("JPEG"), 9, 9)[2:300]
                                                         + b"\xff\xda", 1), CORRUPT),
    "jpeg segment too long": (lambda: encoded("JPEG")[:2] + b"\xff\xe1\xff\xff" + encoded("JPEG")[2:], CORRUPT),
    "jpeg without end": (lambda: encoded("JPEG")[:-2], "truncated"),
    "jpeg with a megabyte of scans behind": (lambda: encoded("JPEG") + b"\xff\xda\0\2" * 2**18, None),
    "jpeg EXIF loop": (lambda: exif_jpeg(tiff([(0x8769, 4, 1, 8)], following=8)), None),
    "jpeg EXIF of 65,535 tags": (lambda: exif_jpeg(tiff([], count=65_535)), None),
    "jpeg EXIF overlapping": (lambda: exif_jpeg(tiff([(i, 7, 32_000, 8) for i in range(2_600)], bytes(32_000))), None),
    "jpeg EXIF orientation is text": (lambda: exif_jpeg(tiff([(0x0112, 2, 2**31, 8)])), None),
    "mpo": (lambda: encoded("JPEG") + encoded("JPEG") * 3, None),
    # GIF
    "gif frame larger than its screen": (lambda: gif((1, 1), (65_535, 65_535)), OVER),
    "gif screen larger than its frame": (lambda: gif((65_535, 65_535), (1, 1)), OVER),
    "gif pixel bomb": (lambda: gif((7900, 7900), (7900, 7900)), THIN),
    "gif of 300,000 frames": (lambda: gif((1, 1), (1, 1), frames=300_000), None),
    "gif comment of 8 MiB": (lambda: gif((1, 1), (1, 1), b"!\xfe" + (b"\xff" + b"a" * 255) * 2**15 + b"\0"), "blocks"),
    "gif 2,000,000 blocks": (lambda: gif((1, 1), (1, 1), b"!\xfe" + b"\1a" * 2_000_000 + b"\0"), "blocks"),
    "gif 1,000,000 extensions": (lambda: gif((1, 1), (1, 1), b"!\xfe\0" * 1_000_000), "blocks"),
    "gif code size of 255": (lambda: gif((1, 1), (1, 1)).replace(b"\x02\x02\x4c", b"\xff\x02\x4c"), CORRUPT),
    # WebP
    "webp canvas lie": (lambda: riff(vp8x(16_383, 16_383), webp_pixels(4, 4)), OVER),
    "webp thin canvas": (lambda: riff(vp8x(7900, 7900), webp_pixels(4, 4)), THIN),
    "webp frame larger than its canvas": (lambda: riff(vp8x(4, 4), webp_pixels(7900, 7900)), f"{THIN}|{CORRUPT}"),
    "webp pixel bomb": (lambda: riff(webp_pixels(7900, 7900)), THIN),
    "webp lossy pixel bomb": (lambda: riff((b"VP8 ", b"\x30\1\0\x9d\1\x2a" + struct.pack("<HH", 7900, 7900))), THIN),
    "webp animation": (lambda: webp_animation((4, 4), 100_000), None),
    "webp animation on a large canvas": (lambda: webp_animation((16_383, 3_900), 2), THIN),
    "webp chunk of 4 GiB": (lambda: riff(vp8x(4, 4), (b"ICCP", bytes(9))).replace(b"ICCP\x09\0\0", b"ICCP\xff\xff\xff"),
                            CORRUPT),
    # BMP
    "bmp negative height": (lambda: bmp(4, -(2**31)), OVER),
    "bmp of endless width": (lambda: bmp(2**31 - 1, 1), OVER),
    "bmp pixel bomb": (lambda: bmp(7900, 7900), THIN),
    "bmp run lengths": (lambda: bmp(3_000, 3_000, 8, 1, b"\1\0\0\0" * 3_000), "run-length"),
    "bmp run lengths of four bits": (lambda: bmp(3_000, 3_000, 4, 2, b"\xff\x12" * 36_000), "run-length"),
    "bmp of 2^32 colours": (lambda: bmp(4, 4, 8, colours=2**32 - 1), CORRUPT),
    # TIFF
    "tiff 2^32 wide": (lambda: tiff(grey(2**32 - 1, 2**32 - 1, 16), bytes(16)), OVER),
    "tiff pixel bomb": (lambda: tiff(grey(7900, 7900, 16), bytes(16)), THIN),
    "tiff directory loop": (lambda: tiff(grey(4, 4, 16), bytes(16), following=24), None),
    "tiff 32,000 tags": (lambda: many_tags(100_000), "tags"),
    "tiff 2^30 strips": (lambda: tiff(grey(4, 4, 16, offsets=(273, 4, 2**30, 8)), bytes(16)), "tags|TIFF"),
    "tiff 2,000,000 strips": (lambda: tiff(grey(4, 4, 16, offsets=(273, 4, 2_000_000, 8)), bytes(8_000_000)), "TIFF"),
    "tiff deflate bomb": (lambda: tiff(grey(4, 4, 100_000, compression=(259, 3, 1, 8)), zeros(2**27)), None),
    "tiff tile of 2 GiB": (lambda: tiled(4, 4, (32_768, 65_536 - 16), 8, zeros(2**27)), f"{OVER}|{THIN}"),
    "tiff tile of 2 GiB, LZW": (lambda: tiled(4, 4, (32_768, 65_536 - 16), 5, bytes(100)), f"{OVER}|{THIN}"),
    "tiff float tiles": (lambda: tiled(16, 16, (16, 16), 1, b"\xff" * 1024, bits=32), "float|TIFF"),
    "tiff LZMA": (lambda: tiff(grey(4, 4, 16, compression=(259, 3, 1, 34925)), bytes(16)), "compression"),
    "tiff Zstandard": (lambda: tiff(grey(4, 4, 16, compression=(259, 3, 1, 50000)), bytes(16)), "compression"),
    "tiff old JPEG": (lambda: tiff(grey(4, 4, 16, compression=(259, 3, 1, 6)), bytes(16)), "compression"),
    "tiff JPEG larger than its tiff": (jpeg_in_tiff, CORRUPT),
    "tiff of 65,535 samples": (lambda: tiff(grey(4, 4, 16, samples=(277, 3, 1, 65_535)), bytes(16)), CORRUPT),
    "tiff of no rows": (lambda: tiff(grey(4, 4, 16, rows=(278, 4, 1, 0), compression=(259, 3, 1, 5)), bytes(16)),
                        CORRUPT),
    # polyglots
    "gif that is a script": (lambda: b"GIF89a/*" + gif((1, 1), (1, 1))[8:] + b"*/=1;alert(1)//", None),
    "png that is a zip": (lambda: png() + b"PK\5\6" + bytes(18), None),
}  # fmt: skip
