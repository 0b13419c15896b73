"""Log-mel spectrograms and SpecAugment, against a plain float64 version, known tones and the masks' distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssljax.config import build
from ssljax.views import LogMel, PerExample, audio_mae, crisscross_audio, spec_augment

RATE = 16_000
NOISE = np.random.default_rng(0).standard_normal(8_000).astype(np.float32) * 0.1


def reference(view: LogMel, sound: np.ndarray) -> np.ndarray:
    """Frame by frame, by numpy's FFT, in float64."""
    window, hop, points = round(view.window * view.rate), round(view.hop * view.rate), view.points
    sound = sound.astype(np.float64)
    if view.centered:
        sound = np.pad(sound, (window // 2, window - window // 2), mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / (window - (view.preemphasis > 0)))
    top = view.high or view.rate / 2
    if view.scale == "slaney":
        below, step = 1000 * 3 / 200, np.log(6.4) / 27
        mel = lambda f: 3 * f / 200 if f < 1000 else below + np.log(f / 1000) / step  # noqa: E731
        hertz = lambda m: 200 * m / 3 if m < below else 1000 * np.exp(step * (m - below))  # noqa: E731
    else:
        mel = lambda f: 1127.01048 * np.log(1 + f / 700)  # noqa: E731
        hertz = lambda m: 700 * (np.exp(m / 1127.01048) - 1)  # noqa: E731
    edges = [mel(view.low) + i * (mel(top) - mel(view.low)) / (view.mels + 1) for i in range(view.mels + 2)]
    axis = [i * view.rate / points for i in range(points // 2 + 1)]
    if view.scale == "kaldi":
        axis = [mel(f) for f in axis]
    else:
        edges = [hertz(m) for m in edges]
    weights = np.zeros((len(axis), view.mels))
    for m, (left, centre, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        for k, f in enumerate(axis):
            if left < f < right:
                weights[k, m] = (f - left) / (centre - left) if f <= centre else (right - f) / (right - centre)
        if view.norm == "slaney":
            weights[:, m] *= 2 / (right - left)
    rows = []
    for start in range(0, len(sound) - window + 1, hop):
        frame = sound[start : start + window]
        if view.preemphasis:
            frame = frame - frame.mean()
            frame = frame - view.preemphasis * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * hann, points)) ** 2
        rows.append((np.log(np.maximum(power @ weights, view.floor)) - view.mean) / view.std)
    return np.array(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": "slaney", "norm": "slaney", "n_fft": 1024, "low": 60.0, "high": 7_600.0},
        {"centered": False, "window": 0.032, "hop": 0.012, "mels": 40},
        {"window": 0.02503, "hop": 0.0101, "mels": 32},  # a hop and a window without a common divisor
        audio_mae()["audio"],
        crisscross_audio()["audio1"],
    ],
)
def test_equals_the_plain_version(options):
    view = build(LogMel, options)
    found = jax.jit(lambda x: view(None, x))(NOISE)
    expected = reference(view, NOISE)
    assert found.dtype == jnp.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_sizes_are_those_of_the_formula():
    assert LogMel()(None, np.zeros(RATE, np.float32)).shape == (101, 80)
    assert build(LogMel, audio_mae()["audio"])(None, np.zeros(10 * RATE, np.float32)).shape == (998, 128)


@pytest.mark.parametrize("hertz", [440.0, 1000.0, 3520.0])
@pytest.mark.parametrize("scale", ["htk", "slaney"])
def test_a_tone_peaks_in_its_band(hertz, scale):
    """By hand: band m of 80 on 0 .. 8 kHz is centred at mel (m + 1) / 81 of the top; 1 kHz is slaney's mel 15."""
    x = np.sin(2 * np.pi * hertz * np.arange(RATE) / RATE).astype(np.float32)
    found = np.asarray(LogMel(scale=scale, n_fft=2048, window=0.1)(None, x))[20:-20].mean(0)
    if scale == "htk":
        mel, top = 2595 * np.log10(1 + hertz / 700), 2595 * np.log10(1 + 8000 / 700)
    else:
        step = 27 / np.log(6.4)
        mel, top = (0.015 * hertz if hertz <= 1000 else 15 + step * np.log(hertz / 1000)), 15 + step * np.log(8)
    assert abs(found.argmax() - (mel / top * 81 - 1)) <= 0.5


def test_power_of_a_tone():
    """A sine of amplitude a at the centre of a bin has the power (a * sum(window) / 2)^2 there."""
    x = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    view = LogMel(n_fft=400, mels=1, low=920.0, high=1080.0)  # 40 Hz a bin: half and whole weight for the peak's five
    expected = (0.5 * 200 / 2) ** 2 * (1 + 2 * 0.25 * (2595 * 0 + _weight(1040)))
    np.testing.assert_allclose(np.exp(view(None, x))[5:-5, 0], expected, rtol=0.02)


def _weight(hertz: float) -> float:
    """Of a bin beside the only triangle's centre; its neighbours in a Hann window have half the amplitude."""
    mel = lambda f: np.log(1 + f / 700)  # noqa: E731
    centre = 700 * (np.exp((mel(920) + mel(1080)) / 2) - 1)
    return (1080 - hertz) / (1080 - centre)


def test_silence_is_the_floor():
    np.testing.assert_allclose(LogMel(floor=1e-6)(None, np.zeros(RATE, np.float32)), np.log(1e-6), rtol=1e-6)


def test_masks_follow_their_distribution():
    """Widths uniform in 0 .. most, places uniform; what is masked is the mean, all else is untouched."""
    view = LogMel(mels=40, time_masks=1, time_width=10, frequency_masks=1, frequency_width=5)
    plain = np.asarray(LogMel(mels=40)(None, NOISE))
    keys = jax.random.split(jax.random.key(0), 2_000)
    masked = np.asarray(jax.jit(jax.vmap(lambda key: view(key, NOISE)))(keys))
    filled = np.abs(masked - plain.mean()) < 1e-4
    times, bands = filled.all(2), filled.all(1)
    for rows, most in ((times, 10), (bands, 5)):
        widths = rows.sum(1)
        counts = np.bincount(widths, minlength=most + 1)
        assert len(counts) == most + 1
        expected = len(keys) / (most + 1)
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
        edges = np.diff(np.pad(rows, ((0, 0), (1, 1))).astype(int), axis=1)
        assert ((edges == 1).sum(1) <= 1).all()  # one stretch
        one = rows[widths == 1].argmax(1) / (rows.shape[1] - 1)
        assert abs(one.mean() - 0.5) < 0.1
        assert one.min() < 0.1
        assert one.max() > 0.9
    inside = times[:, :, None] | bands[:, None, :]
    np.testing.assert_allclose(masked[~inside], np.broadcast_to(plain, masked.shape)[~inside], atol=1e-4)


def test_gain_and_crop_are_drawn_only_with_a_key():
    view = LogMel(mels=20, gain=(0.5, 2.0), frames=11)
    whole = np.asarray(LogMel(mels=20)(None, NOISE))  # 51 frames
    np.testing.assert_allclose(view(None, NOISE), whole[20:31], atol=1e-5)
    shifts, starts = [], set()
    for seed in range(60):
        found = np.asarray(view(jax.random.key(seed), NOISE))
        spread = [np.ptp(found - whole[i : i + 11]) for i in range(41)]
        starts.add(int(np.argmin(spread)))
        assert min(spread) < 1e-3  # one factor for the whole sound: one constant in the logarithm
        shifts.append(np.exp((found - whole[int(np.argmin(spread)) :][:11]).mean() / 2))
    assert min(shifts) >= 0.5 - 1e-3
    assert max(shifts) <= 2 + 1e-3
    assert np.ptp(shifts) > 1
    assert len(starts) > 20


def test_in_a_batch():
    sounds = np.stack([NOISE, NOISE, np.zeros_like(NOISE)])
    views = PerExample({"x": build(LogMel, spec_augment()["audio"])})
    seen = jax.jit(views)(jax.random.key(0), {"audio": sounds})["x"]
    assert seen.shape == (3, 51, 80)
    assert (seen[0] != seen[1]).any()
    several = np.stack([sounds, sounds], axis=1)  # two crops of each sound
    both = jax.jit(views)(jax.random.key(0), {"audio": several})["x"]
    assert both.shape == (3, 2, 51, 80)
    assert (both[0, 0] != both[0, 1]).any()
    quiet = views(None, {"audio": several})["x"]
    np.testing.assert_array_equal(quiet[:, 0], quiet[:, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 9_000.0}, "low < high"),
        ({"high": 9_000.0}, "low < high"),
        ({"n_fft": 256}, "n_fft of at least a window"),
        ({"floor": 0.0}, "above 0"),
        ({"time_masks": -1}, "masks of at least 0"),
        ({"scale": "kaldi", "norm": "slaney"}, "1 over Hz"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        LogMel(**options)


def test_sounds_that_are_too_short():
    with pytest.raises(ValueError, match="too short for a window of 400"):
        LogMel()(None, np.zeros(100, np.float32))
    with pytest.raises(ValueError, match="shorter than a window of 400"):
        LogMel(centered=False)(None, np.zeros(100, np.float32))
    with pytest.raises(ValueError, match="frames=200, but a sound of 8000 samples has 51"):
        LogMel(frames=200)(None, NOISE)
