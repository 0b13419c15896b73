"""Small sound and video files, made by the codecs themselves, for tests."""

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soundfile

SOUNDS = {  # name -> format and coding of soundfile, rate
    "wav": ("WAV", "PCM_16", 22_050),
    "wav of floats": ("WAV", "FLOAT", 44_100),
    "adpcm": ("WAV", "MS_ADPCM", 22_050),
    "flac": ("FLAC", "PCM_16", 44_100),
    "vorbis": ("OGG", "VORBIS", 44_100),
    "opus": ("OGG", "OPUS", 48_000),
    "mp3": ("MP3", "MPEG_LAYER_III", 44_100),
    "aiff": ("AIFF", "PCM_24", 32_000),
}
VIDEOS: dict[str, tuple[str, str, dict[str, str]]] = {  # name -> format, codec and its options
    "h264.mp4": ("mp4", "libx264", {"g": "12", "bf": "3", "sc_threshold": "0"}),
    "open groups.mkv": ("matroska", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
    "refreshed.mkv": ("matroska", "libx264", {"x264-params": "intra-refresh=1:keyint=12"}),
    "vp9.webm": ("webm", "libvpx-vp9", {"g": "12", "lag-in-frames": "16"}),
    "mpeg2.mpg": ("mpeg", "mpeg2video", {"g": "12", "bf": "2"}),
    "mpeg2.ts": ("mpegts", "mpeg2video", {"g": "12", "bf": "2"}),
    "mpeg4.avi": ("avi", "mpeg4", {"g": "12", "bf": "2"}),
    "h264.avi": ("avi", "libx264", {"g": "12", "bf": "2"}),
    "mjpeg.mov": ("mov", "mjpeg", {}),
}


def melody(seconds: float = 2.0, rate: int = 44_100, channels: int = 2) -> np.ndarray:
    """Float32 `[n, channels]`: a rising tone and some noise, nowhere like itself."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal((len(t), channels))
    tones = np.stack([np.sin(2 * np.pi * (200 + 150 * (c + 1) * t) * t) for c in range(channels)], axis=1)
    return (0.3 * tones + 0.03 * noise).astype(np.float32)


def sound_file(name: str, samples: np.ndarray | None = None) -> bytes:
    form, coding, rate = SOUNDS[name]
    file = io.BytesIO()
    soundfile.write(file, melody(rate=rate) if samples is None else samples, rate, format=form, subtype=coding)
    return file.getvalue()


def frame(i: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame i: uint8 `[height, width, 3]`, unlike all others, the same for half a dozen pixels around."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 2 + i * 3, y * 3 + i * 5, np.full_like(x, i * 7)], axis=-1).astype(np.uint8)


def video_file(
    name: str = "h264.mp4",
    frames: int = 40,
    fps: int = 25,
    times: Sequence[int] | None = None,
    sound: np.ndarray | None = None,
    pictures: Sequence[np.ndarray] | None = None,
    rotation: int = 0,
    **settings: Any,
) -> bytes:
    """`times`: of the frames, in 1 / fps. `sound`: `[n, 2]` at 44.1 kHz, as AAC or MP2. `settings`: of the encoder."""
    form, codec, options = VIDEOS[name]
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=fps)
        pictures = pictures or [frame(i) for i in range(frames)]
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.options = ("yuvj420p" if codec == "mjpeg" else "yuv420p"), dict(options)
        for setting, value in settings.items():
            setattr(stream.codec_context, setting, value)
        if rotation:
            stream.set_display_rotation(rotation)
        track: Any = None
        if sound is not None:
            track = container.add_stream("mp2" if form in ("mpeg", "mpegts", "avi") else "aac", rate=44_100)
            track.layout = "stereo"
        for i, picture in enumerate(pictures):
            video_frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            video_frame.pts, video_frame.time_base = (i if times is None else times[i]), Fraction(1, fps)
            container.mux(stream.encode(video_frame))
        container.mux(stream.encode())
        if track is not None and sound is not None:
            audio = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.T), format="fltp", layout="stereo")
            audio.sample_rate, audio.pts, audio.time_base = 44_100, 0, Fraction(1, 44_100)
            resampler = av.AudioResampler(format=track.format, layout="stereo", rate=44_100, frame_size=1152)
            for part in [*resampler.resample(audio), *resampler.resample(None)]:
                container.mux(track.encode(part))
            container.mux(track.encode())
    return file.getvalue()
