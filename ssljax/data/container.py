"""Video files, opened so that nothing but the file is read, and its frames are found by their time stamps.

FFmpeg (by PyAV) knows hundreds of formats, some of which open other files or addresses, and decoders that nobody tries.
Here the first bytes choose one of five formats, nothing but the given file can be opened, and decoders are those of
`DECODERS`.
"""

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter

from ssljax.data.audio import MAX_CHANNELS, MAX_RATE, Sound
from ssljax.data.errors import BadSample
from ssljax.data.pictures import center_box

DECODERS = frozenset({
    "h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libaom-av1", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4",
    "msmpeg4v2", "h263", "mjpeg", "ffv1", "prores", "rawvideo", "theora", "aac", "mp2", "mp2float", "mp3", "mp3float",
    "ac3", "eac3", "vorbis", "opus", "libopus", "flac", "alac", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be",
    "pcm_f32le", "pcm_u8",
})  # fmt: skip
MAX_PACKETS = 2**20  # of all tracks: ten hours of video
MAX_WORK = 2**33  # pixels decoded for a clip: a thousand frames of 4K, or 35,000 of 640 x 360
MAX_ASPECT = 10  # of the longer side to the shorter one
_BOXES_OF_BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"mvex", b"edts", b"udta")
_NEAR = 8  # frames: what is this far ahead is decoded rather than sought
_PREROLL = 0.5  # s of sound decoded before what is wanted: decoders need the frames before
_BUFFER = 2**17  # bytes
_SHRINK, _ENLARGE = (
    kind | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
    for kind in (Interpolation.AREA, Interpolation.BICUBIC)
)


class OpenVideo:
    """A video file of which all packets were listed, but none decoded. To be closed.

    Attributes:
        times: int64 `[n]`, when its frames are shown, in units of `tick` seconds, ascending.
        rate: frames a second, on average.
        width, height: of a frame as it is stored.

    Raises:
        BadSample: not one of the formats, or without video; too large; far shorter than it announces.
    """

    def __init__(self, file: BinaryIO, max_pixels: int):
        self._file, self._format, self._max_pixels = file, _format(file.read(512)), max_pixels
        if self._format == "mov":
            _check_tables(file)
        self._reformatter = VideoReformatter()
        self._open()
        self.width, self.height = self._video.codec_context.width, self._video.codec_context.height
        self._check_size()
        self.tick: Fraction = self._video.time_base or Fraction(1, 1000)
        self._list_packets()
        self.rate = self._rate()

    def close(self) -> None:
        self._container.close()

    @property
    def seconds(self) -> np.ndarray:
        """float64 `[n]`: when each frame is shown, after the first."""
        return (self.times.astype(np.float64) - float(self.times[0])) * float(self.tick)

    def _open(self) -> None:
        """Opens, or opens again: the one way back to the start that all formats have."""
        self._file.seek(0)
        options = {
            "threads": "1",  # the stream has threads of its own
            "max_pixels": str(self._max_pixels),
            "codec_whitelist": ",".join(sorted(DECODERS)),
        }
        container: Any = av.open(
            self._file, "r", self._format, options, io_open=_refuse, buffer_size=_BUFFER, metadata_errors="replace"
        )
        self._container = container
        videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not videos:
            kinds = sorted({s.type for s in container.streams})
            raise BadSample(f"no video in it, only {', '.join(kinds)}" if kinds else "no video in it")
        self._video = self._prepared(videos[0])
        self._audio: Any = next(iter(container.streams.audio), None)

    def _prepared(self, stream: Any) -> Any:
        context = stream.codec_context
        if context is None or context.codec.name not in DECODERS:
            raise BadSample(f"{stream.type} by the codec {'?' if context is None else context.codec.name}: not read")
        context.thread_type, context.thread_count = "NONE", 1
        context.options = {"max_pixels": str(self._max_pixels)}
        return stream

    def _check_size(self) -> None:
        width, height = self.width, self.height
        if not width or not height:
            raise BadSample("no frame size in it: truncated or corrupt")
        if width * height > self._max_pixels:
            raise BadSample(f"frames of {width}x{height} pixels are over the limit of {self._max_pixels:,}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BadSample(f"frames of {width}x{height} pixels: one side is over {MAX_ASPECT} times the other")

    def _list_packets(self) -> None:
        """`times`, `_keys` (the times at which decoding can start) and `_sound_end` from the packets of all tracks."""
        times, keys, count, end, sound_end = [], {}, 0, 0.0, None
        unknown = self._format == "avi" and self._video.codec_context.codec.name in ("h264", "hevc")  # or invented
        video, audio = self._video.index, None if self._audio is None else self._audio.index
        for packet in self._container.demux():
            count += 1
            if count > MAX_PACKETS:
                raise BadSample(f"more than {MAX_PACKETS:,} packets")
            if packet.stream_index not in (video, audio) or not packet.size:
                continue
            time = packet.pts
            if time is not None:
                stop = float((time + (packet.duration or 0)) * packet.time_base)
                end = max(end, stop)
                if packet.stream_index == audio:
                    sound_end = stop if sound_end is None else max(stop, sound_end)
            if packet.stream_index == video and not packet.is_discard:
                unknown |= time is None
                times.append(time)
                if packet.is_keyframe and time is not None:
                    keys[time] = packet.size
        if not times:
            raise BadSample("no frames in it: truncated or corrupt")
        self._numbered = unknown  # no time stamps: frame i is shown at i / rate, and found by counting
        if unknown:
            self.tick = 1 / Fraction(self._video.average_rate or 25)
        self.times = np.arange(len(times)) if unknown else np.unique(np.array(times, np.int64))
        self._keys: dict[int, int] = {} if unknown else keys  # time -> bytes of the packet
        self._key_times = np.array(sorted(self._keys), np.int64)
        self._sound_end = sound_end
        announced = (self._container.duration or 0) / av.time_base
        end -= max(0, self._container.start_time or 0) / av.time_base
        if not unknown and end < 0.9 * announced - 0.5:
            raise BadSample(f"truncated: {announced:.1f} s announced, the end at {end:.1f} s")

    def _rate(self) -> float:
        span = self.seconds[-1]
        return (len(self.times) - 1) / span if span > 0 else float(self._video.average_rate or 25)

    # frames ----------------------------------------------------------------------------------------------------------

    def read(self, wanted: Sequence[int] | np.ndarray, size: int) -> dict[int, np.ndarray]:
        """Some of `times`, ascending -> the frame shown then: uint8 `[size, size, 3]`, the central square.

        Frames are those that decoding the whole file gives: decoding starts at a key frame before them, or at the start
        of the file where that cannot be found.
        """
        found: dict[int, np.ndarray] = {}
        for run in self._runs([int(time) for time in wanted]):
            self._read_run(run, size, found)
        return found

    def _runs(self, wanted: list[int]) -> list[list[int]]:
        """Frames that are decoded together: a new run starts where there is a key frame not just ahead."""
        runs: list[list[int]] = []
        for time in wanted:
            key = self._key_before(time)
            if runs and (key is None or key <= runs[-1][-1] or self._frames_between(runs[-1][-1], key) <= _NEAR):
                runs[-1].append(time)
            else:
                runs.append([time])
        return runs

    def _key_before(self, time: int, back: int = 0) -> int | None:
        at = int(np.searchsorted(self._key_times, time, "right")) - 1 - back
        return int(self._key_times[at]) if at >= 0 else None

    def _frames_between(self, first: int, last: int) -> int:
        return int(np.searchsorted(self.times, last) - np.searchsorted(self.times, first))

    def _read_run(self, run: list[int], size: int, found: dict[int, np.ndarray]) -> None:
        previous, waiting = None, list(reversed(run))
        for time, frame in self._frames_from(run):
            while waiting and waiting[-1] < time:
                found[waiting.pop()] = self._picture(frame if previous is None else previous, size)
            if waiting and waiting[-1] == time:
                found[waiting.pop()] = self._picture(frame, size)
            if not waiting:
                return
            previous = frame
        if previous is None:
            raise BadSample("no frame can be decoded")
        for time in waiting:
            found[time] = self._picture(previous, size)

    def _frames_from(self, run: list[int]) -> Iterator[tuple[int, Any]]:
        """Frames in order, from a key frame at or before the first of `run` on, or from the start: see `_decoded`."""
        wanted = frozenset(run)
        for back in (0, 1):  # in MPEG program streams seeking leads to the key frame after the one that was sought
            if (key := self._key_before(run[0], back)) is None:
                break
            frames = self._decoded(key, wanted)
            first = next(frames, None)
            if first is not None and first[1].key_frame and first[0] <= run[0]:
                yield first
                yield from frames
                return
        yield from self._decoded(None, wanted)

    def _decoded(self, key: int | None, wanted: frozenset[int]) -> Iterator[tuple[int, Any]]:
        """(time, frame) after seeking a key frame, or from the start of the file; none if another packet was found.

        Frames that are not wanted, and that no other frame refers to, may be missing.
        """
        number, last = 0, None
        for packet in self._packets_from(key):
            idle = not self._numbered and packet.size and packet.pts not in wanted
            self._video.codec_context.skip_frame = "NONREF" if idle else "DEFAULT"
            try:
                frames = packet.decode()
            except FFmpegError:
                if last is None:  # many a recording starts within a group of frames
                    continue
                raise
            for frame in frames:
                if (number + 1) * frame.width * frame.height > MAX_WORK:
                    raise BadSample(f"{number:,} frames between a key frame and a clip: encode it with more key frames")
                time, number = number if self._numbered else frame.pts, number + 1
                if time is None or (last is not None and time <= last):
                    continue  # the time stamps lie; what is shown then stays
                last = time
                yield time, frame

    def _packets_from(self, key: int | None) -> Iterator[Any]:
        if key is None:
            self._container.close()
            self._open()
            yield from self._container.demux(self._video)
            return
        try:
            self._container.seek(key, stream=self._video)
        except FFmpegError:
            return
        found = False
        for packet in self._container.demux(self._video):
            if not found and packet.is_keyframe:
                # After seeking, time stamps may be guessed; the size tells whether it is the packet it seems to be.
                if self._keys.get(packet.pts) != packet.size:
                    return
                found = True
            if found:
                yield packet

    def _picture(self, frame: Any, size: int) -> np.ndarray:
        if frame.is_corrupt:
            raise BadSample("a corrupt frame" + ("" if self._numbered else f" at {float(frame.pts * self.tick):.2f} s"))
        wide = self._video.codec_context.sample_aspect_ratio or 1
        width, height = frame.width * (float(wide) if 1 / 4 <= wide <= 4 else 1), frame.height
        shorter = min(width, height)
        if max(width, height) > 4 * MAX_ASPECT * shorter:
            raise BadSample(f"a frame of {frame.width}x{frame.height} pixels")
        # What is cut off is a whole number of pixels on each side, or the square would be half a pixel off the centre.
        width, height = (size + 2 * round((side / shorter - 1) * size / 2) for side in (width, height))
        how = _SHRINK if size <= min(frame.width, frame.height) else _ENLARGE
        small = self._reformatter.reformat(
            frame, width, height, "rgb24", interpolation=how, src_color_range=frame.color_range, threads=1
        )
        top, left, side, _ = center_box(height, width, 1.0)
        square = small.to_ndarray()[top : top + side, left : left + side]
        return np.ascontiguousarray(np.rot90(square, frame.rotation // 90))

    # sound -----------------------------------------------------------------------------------------------------------

    def sound(self) -> Sound | None:
        """The sound track, from the first frame of the video on; None without one. Silent where the track is."""
        if self._audio is None or self._sound_end is None or self._numbered:
            return None
        context = self._prepared(self._audio).codec_context
        rate, channels = context.sample_rate, context.layout.nb_channels
        if not 1 <= channels <= MAX_CHANNELS or not 1 <= rate <= MAX_RATE:
            raise BadSample(f"a sound track of {channels} channels at {rate:,} Hz")
        start = float(self.times[0] * self.tick)
        frames = max(0, round((self._sound_end - start) * rate))

        def read(first: int, stop: int) -> np.ndarray:
            for back in (_PREROLL, 4 * _PREROLL, None):
                seek = None if back is None else start + first / rate - back
                found = np.zeros((stop - first, channels), np.float32)
                if self._read_sound(seek, start + first / rate, found) or back is None:
                    return found
            raise AssertionError  # the last attempt returns

        return Sound(rate, frames, channels, read)

    def _read_sound(self, seek: float | None, start: float, found: np.ndarray) -> bool:
        """Fills `found` with the track from `start` (s) on. False if the seeking led past that, or was refused."""
        if seek is None:
            self._container.close()
            self._open()
            self._prepared(self._audio)
        try:
            if seek is not None:
                self._container.seek(round(seek / self._audio.time_base), stream=self._audio)
            rate, position = self._audio.codec_context.sample_rate, None
            for frame in self._container.decode(self._audio):
                if frame.rate != rate or frame.layout.nb_channels != found.shape[1]:
                    raise BadSample("the sound track changes its rate or channels")
                if frame.pts is not None:
                    stamped = round((float(frame.pts * frame.time_base) - start) * rate)
                    if position is None and seek is not None and stamped > 0:
                        return False
                    # Time stamps are rounded, to 1 ms in Matroska: only a gap is believed.
                    position = stamped if position is None or abs(stamped - position) > rate // 50 else position
                if position is None:
                    continue
                samples = _samples(frame)
                low, high = max(0, -position), min(len(samples), len(found) - position)
                if low < high:
                    found[position + low : position + high] = samples[low:high]
                position += len(samples)
                if position >= len(found):
                    break
        except FFmpegError:
            if seek is None:
                raise
            return False
        return True


def _samples(frame: Any) -> np.ndarray:
    """float32 `[n, channels]`, full scale in [-1, 1]."""
    samples, channels = frame.to_ndarray(), frame.layout.nb_channels
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, channels)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return (samples / float(-np.iinfo(samples.dtype).min)).astype(np.float32)
    return samples.astype(np.float32)


def _format(start: bytes) -> str:
    """FFmpeg's name of the format of a file that starts so."""
    if start.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if start[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"):
        return "mov"
    if start.startswith(b"RIFF") and start[8:12] == b"AVI ":
        return "avi"
    if start.startswith(b"\0\0\1\xba"):
        return "mpeg"
    if start[:1] == start[188:189] == start[376:377] == b"G":
        return "mpegts"
    raise BadSample(f"not a video (starts with {start[:8]!r}); Matroska, WebM, MP4, MOV, AVI and MPEG are read")


def _check_tables(file: BinaryIO) -> None:
    """MP4 and MOV announce samples in tables, or by a bare number, for each of which FFmpeg takes 60 bytes at once.

    Raises BadSample for more than `MAX_PACKETS` samples, or as many boxes.
    """
    end = file.seek(0, io.SEEK_END)
    waiting, samples, boxes = [(0, end)], 0, 0
    while waiting:
        at, stop = waiting.pop()
        while at + 8 <= stop:
            file.seek(at)
            header = file.read(20)  # size, type, then of a table: version and flags, (size of a sample,) number
            size, kind, first = int.from_bytes(header[:4], "big"), header[4:8], 8
            if size == 1:
                size, first = int.from_bytes(header[8:16], "big"), 16
            elif size == 0:
                size = stop - at
            boxes += 1
            if kind in (b"stsz", b"stz2", b"trun"):
                samples += int.from_bytes(header[12:16] if kind == b"trun" else header[16:20], "big")
            elif kind == b"cmov":
                raise BadSample("its header is compressed: write it again")
            if max(samples, boxes) > MAX_PACKETS:
                raise BadSample(f"more than {MAX_PACKETS:,} packets")
            if size < first:
                break
            if kind in _BOXES_OF_BOXES:
                waiting.append((at + first, min(at + size, stop)))
            at += size


def _refuse(url: str, *_: Any) -> Any:
    raise BadSample(f"it refers to another file ({url[:80]!r}), which is not opened")
