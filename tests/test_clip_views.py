"""Views of clips: one draw for all frames of a clip; with sound beside them, from real files."""

import jax
import numpy as np
import pytest
from small import quick_compilation  # noqa: F401

from ssljax.config import Data, build, resolve
from ssljax.data import Clips, HostTransform, Tar, Waveform, train_batches
from ssljax.views import LogMel, PerExample, Together, View, Views, crisscross_audio, simclr, video_mae


def test_a_config_names_readers_and_views():
    clips = {"type": "Clips", "frames": 4, "size": 32, "fps": 10, "audio": {"seconds": 0.4}, "silent": "zeros"}
    parts = (
        {"type": "Views", "views": video_mae(24), "image": "video"},
        {"type": "PerExample", "views": crisscross_audio()},
    )
    given = {
        "train": None,
        "eval_view": None,
        "readers": {"video": clips},
        "views": {"type": "Together", "parts": parts},
    }
    data = build(Data, given)
    assert data.readers == {"video": Clips(4, 32, fps=10.0, audio=Waveform(0.4), silent="zeros")}
    assert build(Data, resolve(data)) == data
    blank = data.transform(data.views).blank()
    batch = {name: np.stack([blank[name]] * 2) for name in ("video", "audio")}
    shapes = jax.eval_shape(data.views, jax.random.key(0), batch)
    assert {name: x.shape for name, x in shapes.items()} == {
        "video": (2, 4, 24, 24, 3),
        "audio1": (2, 41, 80),
        "audio2": (2, 41, 80),
    }


def test_real_videos_to_views(real_data):
    source = Tar(str(real_data / "video" / "clips.tar"))
    clips = Clips(4, 32, fps=10, audio=Waveform(0.4), silent="zeros")
    views = Together(
        (Views({"video": View(**video_mae(24)["video"])}, image="video"), PerExample({"mel": LogMel(mels=20)}))
    )
    batch = next(train_batches(source, HostTransform(readers={"video": clips}), batch_size=6, seed=0))
    seen = jax.jit(views)(jax.random.key(0), {name: batch[name] for name in ("video", "audio")})
    assert seen["video"].shape == (6, 4, 24, 24, 3)
    assert seen["mel"].shape == (6, 41, 20)
    assert all(np.isfinite(x).all() for x in seen.values())


def test_a_clip_is_viewed_as_each_of_its_frames_with_the_same_key():
    clips = np.random.default_rng(0).integers(0, 256, (3, 4, 30, 36, 3), np.uint8)
    one, two = simclr(20).values()
    views = {"x1": View(**one), "x2": View(**{**two, "count": 2, "solarize": 0.3, "jitter": 0.0})}
    key = jax.random.key(1)
    seen = jax.jit(Views(views, image="video"))(key, {"video": clips})
    by_frame = jax.jit(Views(views))
    assert seen["x1"].shape == (3, 4, 20, 20, 3)
    assert seen["x2"].shape == (3, 2, 4, 20, 20, 3)
    for t in range(4):
        frames = by_frame(key, {"image": clips[:, t]})
        for name, axis in (("x1", 1), ("x2", 2)):
            np.testing.assert_allclose(np.take(np.asarray(seen[name]), t, axis), frames[name], atol=1e-5)
    still = np.repeat(clips[:, :1], 4, axis=1)  # a clip of one picture stays one: no draw differs between frames
    one_view = jax.jit(Views({"x1": View(**one)}, image="video"))
    same = np.asarray(one_view(key, {"video": still})["x1"])
    np.testing.assert_array_equal(same, np.repeat(same[:, :1], 4, axis=1))
    alike = np.repeat(clips[:1], 3, axis=0)  # but every clip has draws of its own
    other = np.asarray(one_view(key, {"video": alike})["x1"])
    assert (other[0] != other[1]).any()


def test_several_clips_of_a_video_have_draws_of_their_own():
    clips = np.random.default_rng(0).integers(0, 256, (2, 1, 3, 30, 30, 3), np.uint8).repeat(2, axis=1)
    views = Views({"x": View(16, flip=0.5), "y": View(16, count=3)}, image="video")
    seen = jax.jit(views)(jax.random.key(0), {"video": clips})
    assert seen["x"].shape == (2, 2, 3, 16, 16, 3)
    assert seen["y"].shape == (2, 2, 3, 3, 16, 16, 3)
    assert (seen["x"][:, 0] != seen["x"][:, 1]).any()
    quiet = Views({"x": View(16, crop="center")}, image="video")(None, {"video": clips})["x"]
    np.testing.assert_array_equal(quiet[:, 0], quiet[:, 1])
    with pytest.raises(ValueError, match=r"clips are \[b, t, h, w, c\]"):
        views(jax.random.key(0), {"video": clips[None]})
