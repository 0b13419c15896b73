"""What a method sees of a sound: `LogMel`, with SpecAugment, and published recipes.

A recipe is a function that returns a plain dict, view name -> `type` and fields of `LogMel`:

    config.data.views = {"type": "PerExample", "views": audio_mae()}
    views = ssljax.config.build(PerExample, {"views": crisscross_audio()})
    batch = jax.jit(views)(key, {"audio": waveforms, "label": labels})
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

_EXACT = jax.lax.Precision.HIGHEST  # bfloat16 would add noise 50 dB below the loudest tone of a frame


@dataclass(frozen=True)
class LogMel:
    """Waveform `[..., S]` at `rate` -> log-mel spectrogram, float32 `[..., T, mels]`; an `ExampleView`.

    Frames of `window` seconds every `hop` seconds: power spectrum (Hann window), triangles on the mel scale, natural
    logarithm of at least `floor`, then `(x - mean) / std`. T is `1 + S // hop` if frames are centred on the multiples
    of the hop (the ends reflected, as librosa and torch.stft do), else `1 + (S - window) // hop` (as Kaldi does).

    With a key it draws: the waveform times a `gain`, `frames` successive frames (the middle ones without a key), and
    SpecAugment (Park et al. 2019, section 2, without time warping): masks that cover `w` bands or frames, w uniform in
    0 .. width, at a uniform place, filled with the spectrogram's mean. Leading axes are sounds of their own.

    The transform is one convolution with cosines and sines, into which window and pre-emphasis are multiplied. It suits
    accelerators better than an FFT of 512, knows no complex numbers, makes no copy of overlapping frames, and is as
    exact; only a CPU would be quicker with an FFT.
    """

    rate: int = 16_000  # Hz
    window: float = 0.025  # s
    hop: float = 0.01  # s
    n_fft: int | None = None  # points of the Fourier transform; None: the next power of 2
    mels: int = 80
    low: float = 0.0  # Hz, where the lowest triangle begins
    high: float | None = None  # Hz, where the highest ends; None: rate / 2
    # htk: 2595 log10(1 + f / 700); kaldi: the same, triangles straight in mel, not in Hz; slaney: linear below 1 kHz
    scale: Literal["htk", "kaldi", "slaney"] = "htk"
    norm: Literal["none", "slaney"] = "none"  # slaney: triangles of equal area, 1 over Hz
    centered: bool = True
    preemphasis: float = 0.0  # above 0, as Kaldi: each frame loses its mean, then x[i] - preemphasis * x[i - 1]
    floor: float = 1e-10
    mean: float = 0.0
    std: float = 1.0
    gain: tuple[float, float] = (1.0, 1.0)  # factor of the waveform, uniform
    frames: int | None = None  # None: all
    time_masks: int = 0
    time_width: int = 0  # frames, at most
    frequency_masks: int = 0
    frequency_width: int = 0  # bands, at most
    source: str = "audio"  # entry of the batch

    def __post_init__(self):
        top = self.rate / 2 if self.high is None else self.high
        if not 0 <= self.low < top <= self.rate / 2:
            raise ValueError(f"LogMel needs 0 <= low < high <= {self.rate / 2:g} Hz, got {self.low:g} and {top:g}")
        if min(self._window, self._hop, self.mels) < 1 or self.points < self._window:
            raise ValueError(
                f"LogMel needs a window, a hop and bands of at least 1, and n_fft of at least a window "
                f"({self._window} samples), got {self}"
            )
        if self.scale == "kaldi" and self.norm == "slaney":
            raise ValueError("LogMel.norm='slaney' is 1 over Hz: it goes with the scales htk and slaney")
        if self.floor <= 0 or self.std <= 0 or not 0 < self.gain[0] <= self.gain[1]:
            raise ValueError(f"LogMel needs floor, std and gain above 0, got {self}")
        if min(self.time_masks, self.time_width, self.frequency_masks, self.frequency_width) < 0:
            raise ValueError(f"LogMel needs masks of at least 0, got {self}")

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def _window(self) -> int:
        return round(self.window * self.rate)

    @property
    def _hop(self) -> int:
        return round(self.hop * self.rate)

    @property
    def points(self) -> int:
        """Of the Fourier transform."""
        return 2 ** math.ceil(math.log2(self._window)) if self.n_fft is None else self.n_fft

    def __call__(self, key: Key[Array, ""] | None, sound: Float[Array, "*b s"]) -> Float[Array, "*b t mels"]:
        if sound.ndim > 1:
            keys = None if key is None else jax.random.split(key, len(sound))
            return jax.vmap(self, in_axes=(None if key is None else 0, 0))(keys, sound)
        masks = self.time_masks + self.frequency_masks
        draws = None if key is None else jax.random.uniform(key, (2 + 2 * masks,))
        if draws is not None and self.gain != (1.0, 1.0):
            sound = sound * (self.gain[0] + draws[0] * (self.gain[1] - self.gain[0]))
        x = (jnp.log(jnp.maximum(self.power(sound), self.floor)) - self.mean) / self.std
        if self.frames is not None:
            room = len(x) - self.frames
            if room < 0:
                raise ValueError(f"LogMel.frames={self.frames}, but a sound of {len(sound)} samples has {len(x)}")
            start = room // 2 if draws is None else jnp.minimum(jnp.floor(draws[1] * (room + 1)), room).astype(int)
            x = jax.lax.dynamic_slice_in_dim(x, start, self.frames)
        return x if draws is None or not masks else self._masked(draws[2:].reshape(masks, 2), x)

    def power(self, sound: Float[Array, " s"]) -> Float[Array, "t mels"]:
        """The mel spectrogram before the logarithm."""
        window, hop = self._window, self._hop
        if self.centered:
            before = window // 2
            if len(sound) <= before:
                raise ValueError(f"a sound of {len(sound)} samples is too short for a window of {window}")
            sound = jnp.pad(sound, (before, window - before), mode="reflect")
            count = 1 + (len(sound) - window) // hop
        elif (count := 1 + (len(sound) - window) // hop) < 1:
            raise ValueError(f"a sound of {len(sound)} samples is shorter than a window of {window}")
        # All products of all windows are one convolution, over the largest blocks that window and hop consist of.
        block = math.gcd(window, hop)
        blocks = sound[: (count - 1) * hop + window].reshape(1, -1, block)
        waves = jnp.asarray(_fourier(window, self.points, self.preemphasis)).reshape(window // block, block, -1)
        spectrum = jax.lax.conv_general_dilated(
            blocks, waves, (hop // block,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), precision=_EXACT
        )[0]
        cosine, sine = jnp.split(spectrum, 2, axis=1)
        high = self.rate / 2 if self.high is None else self.high
        triangles = _triangles(self.rate, self.points, self.mels, self.low, high, self.scale, self.norm)
        return jnp.matmul(cosine**2 + sine**2, triangles, precision=_EXACT)

    def _masked(self, draws: Float[Array, "m 2"], x: Float[Array, "t mels"]) -> Float[Array, "t mels"]:
        filling = x.mean()
        masks = [(0, self.time_width)] * self.time_masks + [(1, self.frequency_width)] * self.frequency_masks
        for (axis, most), (size, place) in zip(masks, draws, strict=True):
            length = x.shape[axis]
            width = jnp.floor(size * (min(most, length) + 1))
            start = jnp.floor(place * (length - width + 1))
            at = jnp.arange(length)
            covered = (at >= start) & (at < start + width)
            x = jnp.where(covered[:, None] if axis == 0 else covered, filling, x)
        return x


@functools.lru_cache(maxsize=16)
def _fourier(window: int, points: int, preemphasis: float) -> np.ndarray:
    """float32 `[window, 2 * bins]`: a frame times it gives the cosine and the sine part of its spectrum."""
    phase = 2 * np.pi / points * (np.outer(np.arange(window), np.arange(points // 2 + 1)) % points)
    # Kaldi's window ends in zeros, as scipy's "symmetric" one; that of librosa and torch is periodic.
    hann = np.hanning(window) if preemphasis else np.hanning(window + 1)[:-1]
    waves = hann[:, None] * np.concatenate([np.cos(phase), np.sin(phase)], axis=1)
    if preemphasis:
        difference = np.eye(window) - preemphasis * np.eye(window, k=-1)
        difference[0, 0] = 1 - preemphasis
        waves = (difference @ (np.eye(window) - 1 / window)).T @ waves
    return waves.astype(np.float32)


@functools.lru_cache(maxsize=16)
def _triangles(rate: int, points: int, mels: int, low: float, high: float, scale: str, norm: str) -> np.ndarray:
    """float32 `[bins, mels]`: equal triangles on the mel scale, each reaching to the centres of its neighbours."""
    to_mel, to_hertz = (_slaney, _from_slaney) if scale == "slaney" else (_htk, _from_htk)
    edges = np.linspace(to_mel(low), to_mel(high), mels + 2)
    bins = np.arange(points // 2 + 1)[:, None] * rate / points
    edges, bins = (edges, to_mel(bins)) if scale == "kaldi" else (to_hertz(edges), bins)
    rising = (bins - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins) / np.diff(edges)[1:]
    triangles = np.maximum(0, np.minimum(rising, falling))
    if norm == "slaney":
        triangles *= 2 / (edges[2:] - edges[:-2])
    return triangles.astype(np.float32)


def _htk(hertz: Any) -> Any:
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def _from_htk(mel: Any) -> Any:
    return 700 * (10 ** (np.asarray(mel) / 2595) - 1)


def _slaney(hertz: Any) -> Any:
    hertz = np.asarray(hertz, np.float64)
    return np.where(hertz < 1000, 3 * hertz / 200, 15 + 27 * np.log(np.maximum(hertz, 1e-3) / 1000) / math.log(6.4))


def _from_slaney(mel: Any) -> Any:
    mel = np.asarray(mel, np.float64)
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp(math.log(6.4) / 27 * (mel - 15)))


# -------------------------------------------------------------------------------------------------------------- recipes


def audio_mae() -> dict[str, dict[str, Any]]:
    """Audio-MAE (Huang et al. 2022, section 3 and the official code): view "audio" of sounds at 16 kHz.

    128 bands of Kaldi's filter bank, 25 ms windows every 10 ms, AudioSet's mean and twice its standard deviation;
    nothing is random in pretraining. Ten seconds give 998 frames (the official code adds 26 of zeros).
    """
    return {
        "audio": {
            "type": "LogMel",
            "window": 0.025,
            "hop": 0.01,
            "mels": 128,
            "low": 20.0,
            "scale": "kaldi",
            "centered": False,
            "preemphasis": 0.97,
            "floor": float(np.finfo(np.float32).eps),
            "mean": -4.2677393,
            "std": 2 * 4.5689974,
        }
    }


def crisscross_audio() -> dict[str, dict[str, Any]]:
    """CrissCross (Sarkar and Etemad 2023, supplement): views "audio1" and "audio2" of sounds at 16 kHz.

    80 bands every 10 ms, windows of 1,024 samples; loudness x U(0.8, 1.2), two masks of at most 10 bands and two of at
    most 20 frames. The paper also resizes a random crop of the spectrogram, which is left out.
    """
    view = {
        "type": "LogMel",
        "window": 0.064,
        "hop": 0.01,
        "mels": 80,
        "floor": 1e-6,
        "mean": -5.3688107,
        "std": 4.410007,
        "gain": (0.8, 1.2),
        "time_masks": 2,
        "time_width": 20,
        "frequency_masks": 2,
        "frequency_width": 10,
    }
    return {"audio1": view, "audio2": dict(view)}


def spec_augment(frames: int | None = None) -> dict[str, dict[str, Any]]:
    """SpecAugment (Park et al. 2019, table 1, policy LD), without time warping: view "audio" of sounds at 16 kHz.

    80 bands, two masks of at most 27 bands and two of at most 100 frames. `frames`: how many are cut at random.
    """
    return {
        "audio": {
            "type": "LogMel",
            "mels": 80,
            "frames": frames,
            "time_masks": 2,
            "time_width": 100,
            "frequency_masks": 2,
            "frequency_width": 27,
        }
    }
