"""Reading sounds: every format, crops that equal those of the whole, channels, padding, bad files."""

import contextlib
import io
import resource
import struct

import numpy as np
import pytest
import soundfile
import soxr
from media_files import SOUNDS, melody, sound_file

from ssljax.config import build
from ssljax.data import BadSample, Folder, HostTransform, Loader, Tar, Waveform, eval_batches, train_batches


def draws(count: int):
    return [np.random.default_rng(seed) for seed in range(count)]


# --- crops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOUNDS)
def test_a_crop_is_a_crop_of_the_whole(name, tmp_path):
    """The whole, decoded by soundfile and resampled by soxr in one piece, holds every crop, where it was drawn."""
    data, reader = sound_file(name), Waveform(0.25, rate=16_000)
    decoded, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    whole = soxr.resample(decoded.mean(1), rate, 16_000, "VHQ")
    (tmp_path / "a").write_bytes(data)
    starts = set()
    for rng, same in zip(draws(12), draws(12), strict=True):
        start = reader.starts(len(decoded) * 16_000 // rate, same)[0]
        crop = reader(data, rng)["audio"]
        assert crop.dtype == np.float32
        np.testing.assert_allclose(crop, whole[start : start + 4_000], atol=1e-6)
        starts.add(start)
    assert len(starts) > 10
    np.testing.assert_array_equal(reader(tmp_path / "a", None)["audio"], reader(data, None)["audio"])
    prepared = reader.prepare(data)
    np.testing.assert_allclose(prepared, whole[: len(prepared)], atol=1e-6)
    for rng, same in zip(draws(3), draws(3), strict=True):
        np.testing.assert_allclose(reader(prepared, rng)["audio"], reader(data, same)["audio"], atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("source", [8_000, 16_000, 44_100, 44_101])
def test_any_rate_to_any_rate(source, rate):
    samples = melody(1.5, source, 1)
    file = io.BytesIO()
    soundfile.write(file, samples, source, format="WAV", subtype="FLOAT")
    whole = samples[:, 0] if source == rate else soxr.resample(samples[:, 0], source, rate, "VHQ")
    reader = Waveform(0.1, rate=rate, count=5)
    crops = reader(file.getvalue(), None)["audio"]
    starts = reader.starts(len(samples) * rate // source, None)
    assert starts[0] == 0
    assert starts[-1] >= len(whole) - reader.samples - 1
    for crop, start in zip(crops, starts, strict=True):
        np.testing.assert_allclose(crop, whole[start : start + reader.samples], atol=1e-6)


def test_a_tone_keeps_its_pitch_and_loudness():
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100)
    file = io.BytesIO()
    soundfile.write(file, tone, 44_100, format="WAV", subtype="FLOAT")
    crop = Waveform(0.5)(file.getvalue(), None)["audio"]
    expected = 0.5 * np.sin(2 * np.pi * 440 * (np.arange(8_000) + 4_000) / 16_000)
    np.testing.assert_allclose(crop, expected, atol=1e-4)


def test_only_the_crop_is_decoded(monkeypatch):
    data, read = sound_file("flac", melody(8.0)), []
    original = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, n, *given, **named: read.append(n) or original(self, n, *given, **named),
    )
    Waveform(0.5)(data, np.random.default_rng(0))
    assert sum(read) < 0.6 * 44_100


# --- channels, lengths, arrays --------------------------------------------------------------------


def test_channels():
    left, right = melody(0.1, 16_000).T
    array = np.stack([left, right], axis=1)
    assert Waveform(0.1)(array, None)["audio"].shape == (1_600,)
    np.testing.assert_allclose(Waveform(0.1)(array, None)["audio"], (left + right) / 2, atol=1e-7)
    np.testing.assert_array_equal(Waveform(0.1, channels=2)(array, None)["audio"], array)
    np.testing.assert_array_equal(Waveform(0.1, channels=2)(left, None)["audio"], np.stack([left, left], 1))
    six = np.concatenate([array, np.zeros((1_600, 4), np.float32)], axis=1)
    np.testing.assert_array_equal(Waveform(0.1, channels=2)(six, None)["audio"], array)


def test_short_sounds_are_padded_at_their_end():
    samples = melody(0.1, 16_000, 1)[:, 0]
    for rng in (None, np.random.default_rng(0)):
        padded = Waveform(0.25)(samples, rng)["audio"]
        np.testing.assert_array_equal(padded, np.concatenate([samples, np.zeros(2_400, np.float32)]))
        again = Waveform(0.25, pad="repeat", channels=2)(samples, rng)["audio"]
        np.testing.assert_array_equal(again[:, 0], np.concatenate([samples, samples, samples[:800]]))


@pytest.mark.parametrize("reader", [Waveform(0.1), Waveform(0.1, channels=2, count=3), Waveform(0.3, count=2)])
def test_blank_has_the_shape_of_a_sample(reader):
    (name, blank), *rest = reader.blank().items()
    found = reader(melody(0.2, 16_000), np.random.default_rng(0))[name]
    assert not rest
    assert (blank.shape, blank.dtype) == (found.shape, found.dtype)


def test_a_config_names_it():
    assert build(Waveform, {"type": "Waveform", "seconds": 2, "channels": 2}) == Waveform(2.0, channels=2)
    with pytest.raises(ValueError, match="at least one sample"):
        Waveform(0.0)


# --- through sources and the stream ---------------------------------------------------------------


def test_a_folder_in_batches(tmp_path):
    for i, name in enumerate(SOUNDS):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        ending = {"wav of floats": "wav", "adpcm": "wav", "vorbis": "ogg"}.get(name, name)
        (tmp_path / f"class{i % 2}" / f"{i}.{ending}").write_bytes(sound_file(name))
    (tmp_path / "class0" / "bad.wav").write_bytes(b"RIFF")
    transform = HostTransform(readers={"audio": Waveform(0.2)})
    batches = [
        next(train_batches(Folder(str(tmp_path)), transform, batch_size=9, seed=0, loader=loader))
        for loader in (Loader(threads=0), Loader(threads=2), Loader(threads=0, cache=True))
    ]
    assert batches[0]["audio"].shape == (9, 3_200)
    assert batches[0]["replaced"].sum() >= 1
    for other in batches[1:]:
        np.testing.assert_allclose(batches[0]["audio"], other["audio"], atol=1e-6)
        np.testing.assert_array_equal(batches[0]["index"], other["index"])


def test_real_sounds(real_data):
    source = Tar(str(real_data / "esc10" / "clips.tar"))
    transform = HostTransform(readers={"audio": Waveform(1.0)})
    batch = next(eval_batches(source, transform, batch_size=32, loader=Loader(threads=2)))
    assert batch["mask"].all()
    assert batch["audio"].shape == (32, 16_000)
    for i in (3, 17):
        samples, rate = soundfile.read(io.BytesIO(source[i]["audio"]), dtype="float32")
        whole = soxr.resample(samples, rate, 16_000, "VHQ")
        np.testing.assert_allclose(batch["audio"][i], whole[32_000:48_000], atol=1e-6)


# --- bad files ------------------------------------------------------------------------------------


def refused(value, match: str, reader: Waveform = Waveform(0.2)):
    with pytest.raises(BadSample, match=match):
        reader(value, None)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (b"", "0 bytes"),
        (b"hello, this is no sound", r"not a sound \(starts with b'hello, t'\); WAV, FLAC"),
        (b"RIFF\0\0\0\0AVI LIST", "not a sound"),
        (b"RIFF\0\0\0\0WAVE", "cannot be decoded"),
        (b"OggS", "cannot be decoded"),
        ("a.wav", "expected the bytes of a file, or its path"),
        (np.zeros(9, np.int16), r"int16\[9\]; expected floats"),
        (np.zeros((0, 2), np.float32), "expected floats"),
        (np.zeros((2, 33), np.float32), "33 channels"),
        (np.full(5_000, np.nan, np.float32), "are NaN or infinite"),
    ],
)
def test_what_is_no_sound(value, match):
    refused(value, match)


def test_nan_in_a_file():
    samples = melody(0.5, channels=1)
    samples[11_000] = np.inf
    refused(sound_file("wav of floats", samples), "1 of .* samples are NaN or infinite")


def test_headers_that_lie():
    data = bytearray(sound_file("wav"))
    assert data[36:40] == b"data"
    for frames in (2**31 - 1, 2**32 - 2):  # libsndfile takes what is there
        data[40:44] = struct.pack("<I", frames)
        assert Waveform(0.2)(bytes(data), None)["audio"].any()
    for at, form, value, match in (
        (22, "<H", 200, "200 channels; at most 32"),
        (24, "<I", 2_000_000, "2,000,000 Hz; at most 768,000"),
    ):
        lying = bytearray(sound_file("wav"))
        lying[at : at + struct.calcsize(form)] = struct.pack(form, value)
        refused(bytes(lying), f"{match}|cannot be decoded")


def test_a_long_flac_that_is_not_there_costs_no_memory():
    data = bytearray(sound_file("flac"))
    data[21] = data[21] & 0xF0 | 0x0F  # the upper bits of the number of samples: 18 hours
    data[22:26] = b"\xff" * 4
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(bytes(data), "truncated FLAC|cannot be decoded")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize("name", SOUNDS)
def test_truncated_anywhere(name):
    """A sound or BadSample, never another error."""
    data, reader, found = sound_file(name), Waveform(0.2), 0
    for share in (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999):
        for rng in (None, np.random.default_rng(1)):
            with contextlib.suppress(BadSample):
                found += reader(data[: int(len(data) * share)], rng)["audio"].shape == (3_200,)
    assert found


@pytest.mark.parametrize("name", SOUNDS)
def test_corruption_never_raises_anything_else(name):
    data, rng = sound_file(name, melody(0.3, SOUNDS[name][2])), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for at in rng.integers(0, min(len(data), int(rng.choice([200, len(data)]))), rng.integers(1, 8)):
            damaged[at] = rng.integers(256)
        with contextlib.suppress(BadSample):
            assert np.isfinite(Waveform(0.1)(bytes(damaged), rng)["audio"]).all()
