"""Videos on the host: `Clips` reads the frames of clips, by their time stamps, and the sound that belongs to them.

PyAV (FFmpeg) decodes; it is imported when the first video is read.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from ssljax.data.audio import Sound, Waveform
from ssljax.data.errors import BadSample
from ssljax.data.fields import shown
from ssljax.data.media import open_media, undecodable_is_bad
from ssljax.data.pictures import decode, fit


class Film(Protocol):
    """What clips are cut from."""

    @property
    def times(self) -> np.ndarray: ...  # int64 [n], ascending: names of the frames
    @property
    def seconds(self) -> np.ndarray: ...  # float64 [n], when they are shown, after the first
    def read(self, wanted: Sequence[int] | np.ndarray, size: int) -> dict[int, np.ndarray]: ...
    def sound(self) -> Sound | None: ...


@dataclass(frozen=True)
class Clips:
    """Videos to clips of fixed shape: `{"video": uint8 [frames, size, size, 3]}`, `[count, ...]` with several clips.

    A clip starts at any frame that leaves room for it (with an `rng`) or in the middle; without an `rng` several are
    spread evenly from start to end. It takes every `stride`-th frame of the file; with `fps`, the frames that are shown
    nearest to `stride / fps` seconds apart. A shorter video repeats its last frame. Pictures are the central square,
    resized as by `ssljax.data.pictures.fit`, upright, anamorphic ones with square pixels.

    With `audio`, `"audio"` is the sound from the clip's start on, as `Waveform` gives it: `audio.seconds` has to be
    the clip's length where `fps` says what that is. Silence (zeros) stands where the track has nothing.

    Read are the bytes or the `Path` of a Matroska, WebM, MP4, MOV, AVI or MPEG file, a uint8 array `[T, H, W, 3]`, or
    a list of the bytes of pictures. The last two have no time stamps: they are at `fps` already. Of a file, the packets
    are listed, and frames decoded from the key frame before a clip on; they are those that decoding all of it gives.
    `Loader.cache` keeps videos encoded.

    Raises:
        BadSample: no such file; truncated or corrupt where it is read; frames of more than `max_pixels`; no sound track
            where one is needed.
    """

    frames: int
    size: int
    fps: float | None = None  # frames a second; None: the file's own
    stride: int = 1
    count: int = 1
    audio: Waveform | None = None
    silent: Literal["error", "zeros"] = "error"  # what becomes of videos without a sound track, given `audio`
    max_pixels: int = 16_000_000  # of a frame

    def __post_init__(self):
        if min(self.frames, self.size, self.stride, self.count) < 1:
            raise ValueError(f"frames, size, stride and count must be at least 1, got {self}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be above 0, got {self.fps}")
        if self.audio is not None and self.audio.count != 1:
            raise ValueError("Clips.count says how many clips there are; audio.count must be 1")
        if self.audio is not None and self.fps is not None:
            seconds = self.frames * self.stride / self.fps
            if abs(self.audio.seconds - seconds) > 0.5 * self.stride / self.fps:
                raise ValueError(
                    f"clips of {self.frames} frames last {seconds:g} s, but audio.seconds is {self.audio.seconds:g}"
                )

    def __call__(self, value: Any, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        with opened_video(value, self.max_pixels) as film:
            starts = self._starts(film, rng)
            clips = [self._times(film, start) for start in starts]
            pictures = film.read(np.unique(clips), self.size)
            sample: dict[str, np.ndarray] = {}
            sample["video"] = np.stack([np.stack([pictures[time] for time in clip.tolist()]) for clip in clips])
            if self.audio is not None:
                sample["audio"] = self._sounds(film, starts, self.audio)
        return {name: found if self.count > 1 else found[0] for name, found in sample.items()}

    def blank(self) -> dict[str, np.ndarray]:
        draws = (self.count,) if self.count > 1 else ()
        sample: dict[str, np.ndarray] = {"video": np.zeros((*draws, self.frames, self.size, self.size, 3), np.uint8)}
        if self.audio is not None:
            sound = self.audio.blank()["audio"]
            sample["audio"] = np.zeros((*draws, *sound.shape), np.float32)
        return sample

    def _starts(self, film: Film, rng: np.random.Generator | None) -> list[int]:
        """The first frame of each clip."""
        if self.fps is None or isinstance(film, _Pictures):
            last = len(film.times) - 1 - (self.frames - 1) * self.stride
        else:
            seconds = film.seconds
            spare = seconds[-1] - (self.frames - 1) * self.stride / self.fps + 1e-3  # time stamps are rounded
            last = int(np.searchsorted(seconds, spare, "right")) - 1
        last = max(0, last)
        if rng is not None:
            return rng.integers(last + 1, size=self.count).tolist()
        return [last // 2] if self.count == 1 else np.linspace(0, last, self.count).round().astype(int).tolist()

    def _times(self, film: Film, start: int) -> np.ndarray:
        """int64 `[frames]`."""
        steps = np.arange(self.frames) * self.stride
        if self.fps is None or isinstance(film, _Pictures):
            return film.times[np.minimum(start + steps, len(film.times) - 1)]
        seconds = film.seconds
        wanted = seconds[start] + steps / self.fps
        after = np.minimum(np.searchsorted(seconds, wanted), len(seconds) - 1)
        before = np.maximum(after - 1, 0)
        return film.times[np.where(wanted - seconds[before] <= seconds[after] - wanted, before, after)]

    def _sounds(self, film: Film, starts: Sequence[int], audio: Waveform) -> np.ndarray:
        if (sound := film.sound()) is None:
            if self.silent == "error":
                raise BadSample("no sound track; silent='zeros' of the reader allows that")
            return np.stack([audio.blank()["audio"]] * len(starts))
        return np.stack([audio.crop(sound, round(film.seconds[start] * audio.rate)) for start in starts])


@contextmanager
def opened_video(value: Any, max_pixels: int) -> Iterator[Film]:
    if isinstance(value, np.ndarray):
        if value.ndim != 4 or value.dtype != np.uint8 or value.shape[3] != 3 or 0 in value.shape:
            raise BadSample(f"'video' is {shown(value)}; expected uint8 [T, H, W, 3], or an encoded file")
        yield _Pictures(len(value), lambda i: value[i])
    elif isinstance(value, list | tuple):
        if not value:
            raise BadSample("no frames")
        yield _Pictures(len(value), lambda i: decode(value[i], max_pixels=max_pixels))
    else:
        from ssljax.data.container import OpenVideo

        with open_media(value, "video") as file, undecodable_is_bad():
            film = OpenVideo(file, max_pixels)
            try:
                yield film
            finally:
                film.close()


@dataclass(frozen=True)
class _Pictures:
    """Frames that lie there one by one."""

    count: int
    picture: Callable[[int], np.ndarray]

    @property
    def times(self) -> np.ndarray:
        return np.arange(self.count)

    @property
    def seconds(self) -> np.ndarray:
        return np.arange(self.count, dtype=np.float64)

    def read(self, wanted: Sequence[int] | np.ndarray, size: int) -> dict[int, np.ndarray]:
        return {int(i): fit(self.picture(int(i)), size) for i in wanted}

    def sound(self) -> Sound | None:
        return None
