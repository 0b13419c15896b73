"""Videos and sounds as small pictures, and in figures, for contact sheets."""

from typing import Any

import numpy as np
from einops import rearrange

from ssljax.data.audio import opened_sound, resampled
from ssljax.data.video import Clips, opened_video

_SIDE = 128  # pixels
_LONGEST = 30  # s of a sound, from its middle
_RATE, _WINDOW = 16_000, 1_024  # Hz, samples
_RANGE = 70  # dB below the loudest, from where on it is dark


def stills(video: Any) -> np.ndarray:
    """Four frames spread over a video, in rows: uint8 `[128, 128, 3]`. Raises BadSample."""
    frames = Clips(frames=1, size=_SIDE // 2, count=4)(video, None)["video"]
    return rearrange(frames, "(down across) 1 h w c -> (down h) (across w) c", down=2)


def spectrogram(audio: Any) -> np.ndarray:
    """Log-mel spectrogram, low tones at the bottom: uint8 `[128, 128, 3]`. Raises BadSample."""
    from matplotlib import colormaps  # slow to import

    with opened_sound(audio, _RATE) as sound:
        length = sound.length(_RATE)
        start = max(0, length - _LONGEST * _RATE) // 2
        samples = resampled(sound, _RATE, 1, start, min(length, start + _LONGEST * _RATE))
    samples = np.pad(samples, _WINDOW // 2)
    starts = np.linspace(0, len(samples) - _WINDOW, _SIDE).astype(int)
    frames = samples[starts[:, None] + np.arange(_WINDOW)] * np.hanning(_WINDOW)
    power = np.abs(np.fft.rfft(frames)) ** 2
    mel = 2595 * np.log10(1 + np.fft.rfftfreq(_WINDOW, 1 / _RATE) / 700)
    centres = np.linspace(mel[1], mel[-1], _SIDE)
    # Where bands are narrower than the bins they lie between two, elsewhere they hold several.
    width = np.maximum(centres[1] - centres[0], np.interp(centres, mel[1:], np.diff(mel)))
    weights = np.maximum(0, 1 - np.abs(mel[:, None] - centres) / width)
    loudness = 10 * np.log10(np.maximum(power @ (weights / weights.sum(0)), 1e-12))
    shade = np.clip(1 + (loudness - loudness.max()) / _RANGE, 0, 1)
    return colormaps["magma"](shade.T[::-1], bytes=True)[..., :3]


def video_track(video: Any) -> dict[str, float]:
    """Unit -> how much of it. Raises BadSample."""
    from ssljax.data.container import OpenVideo  # FFmpeg

    with opened_video(video, Clips.max_pixels) as film:
        facts = {"frames": float(len(film.times))}
        if isinstance(film, OpenVideo):
            facts |= {"fps": film.rate, "s": len(film.times) / film.rate}
            facts |= {"pixels wide": film.width, "pixels high": film.height}
            if sound := film.sound():
                facts["Hz of sound"] = sound.rate
        return facts


def track(audio: Any) -> dict[str, float]:
    """Unit -> how much of it. Raises BadSample."""
    with opened_sound(audio, _RATE) as sound:
        if isinstance(audio, np.ndarray):
            return {"samples": sound.frames, "channels": sound.channels}
        return {"s": sound.frames / sound.rate, "Hz": sound.rate, "channels": sound.channels}
