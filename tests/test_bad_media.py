"""Videos that lie, are cut, or reach for other files: BadSample and a reason, soon, and nothing else."""

import contextlib
import io
import resource
import struct
import time

import av
import numpy as np
import pytest
from media_files import VIDEOS, frame, melody, sound_file, video_file

from ssljax.data import BadSample, Clips, Waveform, inspect
from ssljax.data import container as container_module
from ssljax.data.container import OpenVideo
from ssljax.data.media_previews import spectrogram, stills

READER = Clips(frames=3, size=16)


def refused(value, match: str, reader: Clips = READER):
    with pytest.raises(BadSample, match=match):
        reader(value, None)


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (b"", "0 bytes"),
        (b"hello, this is no video", r"not a video \(starts with b'hello, t'\); Matroska, WebM"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "not a video"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video"),
        (b"<?xml version='1.0'?><MPD></MPD>", "not a video"),
        (b"YUV4MPEG2 W64 H48 F25:1\nFRAME\n", "not a video"),
        (b"\x1a\x45\xdf\xa3", "cannot be decoded"),
        (b"\0\0\0\x10ftypisom\0\0\0\0", "cannot be decoded|no video"),
        (b"RIFF\x10\0\0\0AVI LIST", "cannot be decoded|no video"),
        (b"\0\0\1\xba" * 100, "cannot be decoded|no video"),
        ("a.mp4", "expected the bytes of a file, or its path"),
        (np.zeros((4, 8, 8), np.uint8), r"uint8\[4, 8, 8\]; expected uint8 \[T, H, W, 3\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "expected uint8"),
        ((), "no frames"),
        ((b"no picture",), "not an image"),
    ],
)
def test_what_is_no_video(value, match):
    refused(value, match)


def test_other_things_in_a_container():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        track = container.add_stream("aac", rate=44_100)
        sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(melody(0.5).T), format="fltp", layout="stereo")
        sound.sample_rate = 44_100
        container.mux([*track.encode(sound), *track.encode()])
    refused(file.getvalue(), "no video in it, only audio")
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("wmv2", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(frame(0), format="rgb24")), *stream.encode()])
    refused(file.getvalue(), "codec wmv2")


def test_sizes():
    data = video_file()
    refused(data, "frames of 64x48 pixels are over the limit of 3,071", Clips(3, 16, max_pixels=3_071))
    assert Clips(3, 16, max_pixels=3_072)(data, None)
    refused(video_file(pictures=[frame(0, 16, 256)] * 2), "256x16 pixels: one side is over 10 times the other")
    lying = bytearray(data)  # H.264 knows its own size, whatever the header of the file says
    at = lying.index(b"avc1", lying.index(b"stsd")) + 28
    assert struct.unpack_from(">HH", lying, at) == (64, 48)
    struct.pack_into(">HH", lying, at, 65_535, 65_535)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(BadSample):
        READER(bytes(lying), None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_tables_that_announce_millions():
    """A constant sample size and one chunk: twelve bytes that FFmpeg would turn into gigabytes."""
    data = bytearray(video_file())
    struct.pack_into(">II", data, data.index(b"stsz") + 8, 1, 20_000_000)
    struct.pack_into(">III", data, data.index(b"stsc") + 12, 1, 20_000_000, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(bytes(data), "more than 1,048,576 packets")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024
    refused(box(b"ftyp", b"isom") + box(b"moov", box(b"cmov", bytes(64))), "its header is compressed")
    refused(box(b"ftyp", b"isom") + box(b"free", b"") * 10, "cannot be decoded|no video|no frame")


def test_other_files_stay_closed(tmp_path):
    """A MOV may say that its frames lie in another file."""
    secret = tmp_path / "secret"
    secret.write_bytes(video_file("mjpeg.mov", pictures=[frame(i + 5) for i in range(40)]))
    data = video_file("mjpeg.mov")
    at = data.index(b"dref") - 4
    old = data[at : at + struct.unpack_from(">I", data, at)[0]]
    path = str(secret).encode() + b"\0" * (len(str(secret)) % 2)
    alias = bytes(50) + bytes([6]) + b"secret".ljust(63) + bytes(16) + struct.pack(">HH", 1, 1) + bytes(16)
    alias += struct.pack(">HH", 2, len(path)) + path + struct.pack(">HH", 0xFFFF, 0)
    for kind, reference in ((b"url ", b"file://" + path + b"\0"), (b"alis", alias)):
        new = box(b"dref", struct.pack(">II", 0, 1) + box(kind, bytes(4) + reference))
        grown, changed = len(new) - len(old), bytearray(data)
        changed[at : at + len(old)] = new
        for parent in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):  # all around it grow
            where = changed.index(parent) - 4
            struct.pack_into(">I", changed, where, struct.unpack_from(">I", changed, where)[0] + grown)
        if kind == b"alis":  # FFmpeg knows what that means: no frames are left
            refused(bytes(changed), "no frames in it")
        else:  # and passes over this: frames are those of the file itself
            np.testing.assert_array_equal(READER(bytes(changed), None)["video"], READER(data, None)["video"])
    with pytest.raises(BadSample, match=r"refers to another file \('/etc/passwd'\)"):
        container_module._refuse("/etc/passwd", 1, {})


def test_groups_of_frames_without_end(monkeypatch):
    monkeypatch.setattr(container_module, "MAX_WORK", 5 * 64 * 48)
    film = OpenVideo(io.BytesIO(video_file(frames=40)), 10_000)  # a key frame every 12
    assert film.read(film.times[[3, 12, 25]], 16)
    with pytest.raises(BadSample, match="5 frames between a key frame and a clip: encode it with more key frames"):
        film.read(film.times[11:12], 16)


def noise(count: int) -> list[np.ndarray]:
    """Moving pictures that do not compress well."""
    blocks = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    return [np.roll(blocks, 3 * i, axis=1) for i in range(count)]


def test_a_file_that_changes(tmp_path):
    path = tmp_path / "a.mov"
    path.write_bytes(video_file("mjpeg.mov", pictures=noise(120)))
    with open(path, "rb") as file:
        film = OpenVideo(file, 100_000)
        path.write_bytes(path.read_bytes()[:3_000])  # cut after it was opened
        with pytest.raises((BadSample, av.FFmpegError)):
            film.read(film.times[10:13], 16)
        film.close()
    with pytest.raises(FileNotFoundError):
        READER(tmp_path / "gone.mp4", None)


@pytest.mark.parametrize("name", VIDEOS)
def test_truncated_anywhere(name):
    """Frames of what is there, or BadSample. Where the length is announced, half a file is refused."""
    data = video_file(name, frames=60, sound=melody(2.0) if name == "h264.mp4" else None)
    for share in (0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 0.95, 0.999):
        for rng in (None, np.random.default_rng(3)):
            with contextlib.suppress(BadSample):
                assert READER(data[: int(len(data) * share)], rng)["video"].shape == (3, 16, 16, 3)
    if name.split(".")[1] in ("mp4", "mkv", "webm", "mov"):
        refused(data[: len(data) // 2], "truncated|cannot be decoded|no video|no frame")


@pytest.mark.parametrize("name", VIDEOS)
def test_corruption_never_raises_anything_else(name):
    with_sound = Clips(frames=3, size=16, audio=Waveform(0.1), silent="zeros")
    data, rng = video_file(name, frames=20, sound=melody(0.8) if "h264" in name else None), np.random.default_rng(0)
    started, good = time.monotonic(), 0
    for _ in range(80):
        damaged = bytearray(data)
        for at in rng.integers(0, int(rng.choice([600, len(data)])), rng.integers(1, 12)):
            damaged[at] = rng.integers(256)
        with contextlib.suppress(BadSample):
            good += with_sound(bytes(damaged), rng)["video"].shape == (3, 16, 16, 3)
    assert good
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", ["h264.mp4", "open groups.mkv", "mpeg4.avi"])
def test_a_damaged_frame_is_refused(name):
    """Where the codec notices; VP9, say, has nothing to notice it by."""
    data = bytearray(video_file(name, pictures=noise(40)))
    with av.open(io.BytesIO(data)) as container:
        keys = [packet for packet in container.demux(video=0) if packet.is_keyframe and packet.size]
    start, size = keys[1].pos + 40, keys[1].size - 40
    data[start : start + size] = np.random.default_rng(0).bytes(size)
    refused(bytes(data), r"corrupt frame at 0\.[45]\d s|cannot be decoded", Clips(frames=20, size=16))
    assert Clips(frames=3, size=16, count=2)(bytes(data), None)  # what is read lies elsewhere


# --- looking at them ------------------------------------------------------------------------------


def test_previews(tmp_path):
    pictures = [np.full((48, 64, 3), colour, np.uint8) for colour in (10, 90, 170, 250) for _ in range(10)]
    sheet = stills(video_file(pictures=pictures))
    assert sheet.shape == (128, 128, 3)
    corners = [sheet[32, 32], sheet[32, 96], sheet[96, 32], sheet[96, 96]]
    np.testing.assert_allclose(np.mean(corners, axis=1), (10, 90, 170, 250), atol=6)
    tones = np.concatenate([np.sin(np.arange(16_000) * 2 * np.pi * f / 16_000) for f in (300, 4_000)])
    picture = spectrogram(tones.astype(np.float32)).astype(int).sum(2)
    assert picture.shape == (128, 128)
    low, high = picture[:, 30].argmax(), picture[:, 98].argmax()
    mel = 2595 * np.log10(1 + np.array([300, 4_000, 8_000]) / 700)
    np.testing.assert_allclose([low, high], 127 * (1 - mel[:2] / mel[2]), atol=3)


def test_inspection(tmp_path):
    from ssljax.data import Folder

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.mp4").write_bytes(video_file(sound=melody(1.6)))
    (tmp_path / "a" / "2.mp4").write_bytes(video_file(frames=20))
    (tmp_path / "a" / "bad.mp4").write_text("")
    found = inspect(Folder(str(tmp_path)), str(tmp_path / "sheet.png"))
    assert found["unreadable"] == {"a/bad.mp4": "0 bytes"}
    assert found["keys"]["video"].endswith(
        ", 20 .. 40 frames, 25 fps, 0.8 .. 1.6 s, 64 pixels wide, 48 pixels high, 44100 Hz of sound"
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.flac").write_bytes(sound_file("flac"))
    found = inspect(Folder(str(tmp_path / "b")), str(tmp_path / "sheet.png"))
    assert found["keys"]["audio"].endswith(", 2 s, 44100 Hz, 2 channels")
