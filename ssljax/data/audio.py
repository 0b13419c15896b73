"""Sounds on the host: `Waveform` reads crops of encoded files without decoding the rest.

soundfile (libsndfile) decodes, soxr resamples. Both are imported when the first sound is read: training on pictures
starts without them.
"""

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from ssljax.data.errors import BadSample
from ssljax.data.fields import shown
from ssljax.data.media import open_media, undecodable_is_bad

MAX_CHANNELS, MAX_RATE = 32, 768_000  # what a header may announce
_MAX_FRAMES = 2**40  # libsndfile says 2^63 - 1 where a stream does not tell its length
_LARGEST_PREPARED = 2**26  # samples kept decoded by `Loader.cache`: 256 MiB, 70 minutes at 16 kHz
_MARGIN = 256  # samples of the slower rate that the resampling filter sees on each side of a crop; 28 bits deep
_RUN_IN = 0.25  # s decoded before a crop of a file whose frames lean on the ones before (MP3)
_PIECE = 2**16  # samples decoded at a time where they are not used
_FORMATS = {  # how a file starts -> its format; libsndfile knows twenty more, old and rarely tried
    b"RIFF": "WAV", b"RIFX": "WAV", b"RF64": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg", b"FORM": "AIFF", b"ID3": "MP3",
    b"\xff\xfb": "MP3", b"\xff\xfa": "MP3", b"\xff\xf3": "MP3", b"\xff\xf2": "MP3", b"\xff\xe3": "MP3",
}  # fmt: skip


@dataclass(frozen=True)
class Sound:
    """A sound of which only the header was read: `read(start, stop)` gives float32 `[stop - start, channels]`."""

    rate: int  # Hz
    frames: int  # samples of a channel
    channels: int
    read: Callable[[int, int], np.ndarray]

    def length(self, rate: int) -> int:
        """Samples of the whole, resampled to `rate`."""
        return self.frames * rate // self.rate


@dataclass(frozen=True)
class Waveform:
    """Sounds to crops of fixed length: `{"audio": float32 [S]}`, S = `seconds * rate`, full scale in [-1, 1].

    `[count, S]` with several crops, and `[..., 2]` with two channels. A crop lies anywhere in the sound (with an `rng`)
    or in its middle; without an `rng` several are spread evenly from start to end. A shorter sound is padded at its
    end, with zeros or by starting again.

    Read are the bytes or the `Path` of a WAV, FLAC, Ogg (Vorbis, Opus), MP3 or AIFF file, or a float array `[T]` or
    `[T, C]` that is at `rate` already. Files are decoded around the crop only, and resampled (soxr, VHQ) with so much
    on both sides that the crop equals that of the whole resampled, to 1e-6. So damage elsewhere in the file is not
    seen. Only Vorbis is decoded from its start. One channel is the mean of all; two are the first two, or one twice.

    Raises:
        BadSample: no such file; empty, truncated or corrupt at the crop; more than 32 channels or 768 kHz; NaN.
    """

    seconds: float
    rate: int = 16_000  # Hz
    channels: Literal[1, 2] = 1
    count: int = 1
    pad: Literal["zeros", "repeat"] = "zeros"

    def __post_init__(self):
        if self.samples < 1 or self.rate < 1 or self.count < 1:
            raise ValueError(f"Waveform needs at least one sample, 1 Hz and a count of 1, got {self}")

    @property
    def samples(self) -> int:
        """Of a channel of a crop."""
        return round(self.seconds * self.rate)

    def __call__(self, value: Any, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        with opened_sound(value, self.rate) as sound:
            starts = self.starts(sound.length(self.rate), rng)
            crops = [self.crop(sound, start) for start in starts]
        return {"audio": crops[0] if self.count == 1 else np.stack(crops)}

    def blank(self) -> dict[str, np.ndarray]:
        draws, channels = (self.count,) * (self.count > 1), (2,) * (self.channels == 2)
        return {"audio": np.zeros((*draws, self.samples, *channels), np.float32)}

    def prepare(self, value: Any) -> Any:
        """The whole sound as an array; one of more than 2^26 samples stays encoded."""
        with opened_sound(value, self.rate) as sound:
            if max(sound.frames * sound.channels, sound.length(self.rate) * self.channels) > _LARGEST_PREPARED:
                return value
            return resampled(sound, self.rate, self.channels, 0, sound.length(self.rate))

    def starts(self, length: int, rng: np.random.Generator | None) -> Sequence[int]:
        """Where the crops of a sound of so many samples begin."""
        room = max(0, length - self.samples)
        if rng is not None:
            return rng.integers(room + 1, size=self.count).tolist()
        return [room // 2] if self.count == 1 else np.linspace(0, room, self.count).round().astype(int).tolist()

    def crop(self, sound: Sound, start: int) -> Float32[np.ndarray, "..."]:
        """Samples `start` (which may be negative: silence) to `start + samples` of the sound at `rate`."""
        before = max(0, -start)
        stop = min(start + self.samples, sound.length(self.rate))
        found = resampled(sound, self.rate, self.channels, max(0, start), max(0, stop))
        if self.pad == "repeat" and not before and 0 < len(found) < self.samples:
            return np.resize(found, (self.samples, *found.shape[1:]))
        if before or len(found) < self.samples:
            after = max(0, self.samples - before - len(found))
            found = np.pad(found, [(before, after)] + [(0, 0)] * (found.ndim - 1))[: self.samples]
        return found


def resampled(sound: Sound, rate: int, channels: int, start: int, stop: int) -> np.ndarray:
    """Samples `start` to `stop` of the whole sound at `rate`; float32 `[n]`, or `[n, 2]` of two channels.

    Raises BadSample for NaN and infinity.
    """
    if stop <= start:
        return np.zeros((0, 2) if channels == 2 else 0, np.float32)
    if sound.rate == rate:
        return _mixed(sound.read(start, stop), channels)
    common = math.gcd(sound.rate, rate)
    step, step_out = sound.rate // common, rate // common  # so many samples before and after take the same time
    margin = -(-_MARGIN * max(sound.rate, rate) // rate)
    first = max(0, start * sound.rate // rate - margin) // step * step
    last = min(sound.frames, -(-stop * sound.rate // rate) + margin)

    import soxr

    whole = soxr.resample(_mixed(sound.read(first, last), channels), sound.rate, rate, "VHQ")
    offset = first // step * step_out
    return whole[start - offset : stop - offset]


def _mixed(samples: np.ndarray, channels: int) -> np.ndarray:
    if not np.isfinite(samples).all():
        raise BadSample(f"{(~np.isfinite(samples)).sum():,} of {samples.size:,} samples are NaN or infinite")
    if channels == 1:
        return samples[:, 0] if samples.shape[1] == 1 else samples.mean(1)
    return np.repeat(samples, 2, axis=1) if samples.shape[1] == 1 else np.ascontiguousarray(samples[:, :2])


@contextmanager
def opened_sound(value: Any, rate: int) -> Iterator[Sound]:
    """A value of a record as a `Sound`; what the codecs raise is BadSample."""
    if isinstance(value, np.ndarray):
        yield _of_array(value, rate)
        return
    with open_media(value, "audio") as file, undecodable_is_bad():
        start = file.read(12)
        name = next((name for magic, name in _FORMATS.items() if start.startswith(magic)), None)
        if name is None or (start[:4] in (b"RIFF", b"RIFX") and start[8:12] != b"WAVE"):
            raise BadSample(f"not a sound (starts with {start[:8]!r}); WAV, FLAC, Ogg, MP3 and AIFF are read")

        import soundfile

        if isinstance(value, Path):  # by its number, a file is read without Python
            os.lseek(file.fileno(), 0, os.SEEK_SET)
        with soundfile.SoundFile(file.fileno() if isinstance(value, Path) else _Bytes(value), closefd=False) as sound:
            yield _of_file(sound, name)


class _Bytes(io.BytesIO):
    """Says no to seeking before the start; an exception would end on the terminal, within libsndfile's callback."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _of_file(sound: Any, name: str) -> Sound:
    rate, frames, channels = sound.samplerate, sound.frames, sound.channels
    if not 1 <= channels <= MAX_CHANNELS:
        raise BadSample(f"{channels} channels; at most {MAX_CHANNELS} are read")
    if not 1 <= rate <= MAX_RATE:
        raise BadSample(f"{rate:,} Hz; at most {MAX_RATE:,} are read")
    if not frames:
        raise BadSample("no samples")
    if frames > _MAX_FRAMES:
        raise BadSample(f"a {name} file that does not say how long it is: write it again")
    # Seeking in Vorbis, libsndfile 1.2.2 at times lands a block away: its files are decoded from the start.
    run_in = {"MPEG_LAYER_III": round(_RUN_IN * rate), "VORBIS": frames}.get(sound.subtype, 0)

    def read(first: int, stop: int) -> np.ndarray:
        start = max(0, first - run_in)
        sound.seek(start)
        while start < first and (passed := len(sound.read(min(first - start, _PIECE), "float32"))):
            start += passed
        samples = sound.read(stop - first, "float32", always_2d=True)
        if len(samples) < stop - first:
            raise BadSample(f"truncated {name}: {frames:,} samples announced, the end at {start + len(samples):,}")
        return samples

    return Sound(rate, frames, channels, read)


def _of_array(samples: np.ndarray, rate: int) -> Sound:
    if samples.ndim not in (1, 2) or 0 in samples.shape or samples.dtype.kind != "f":
        raise BadSample(f"'audio' is {shown(samples)}; expected floats [T] or [T, C], or an encoded file")
    samples = samples.reshape(len(samples), -1)
    if samples.shape[1] > MAX_CHANNELS:
        raise BadSample(f"{samples.shape[1]} channels; at most {MAX_CHANNELS} are read")
    return Sound(rate, len(samples), samples.shape[1], lambda start, stop: samples[start:stop].astype(np.float32))
