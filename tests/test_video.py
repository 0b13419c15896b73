"""Clips of videos: the frames of a whole decoding, whatever is sought; time stamps, sound, shapes."""

import io
import itertools
import tarfile
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
import scipy.signal
import soundfile
from media_files import VIDEOS, frame, melody, video_file

from ssljax.config import build
from ssljax.data import BadSample, Clips, Folder, HostTransform, Loader, Tar, Waveform, eval_batches, train_batches
from ssljax.data.container import OpenVideo
from ssljax.data.pictures import fit

SIZE = 24


def check_every_start(data: bytes, starts: slice):
    """Frames read after seeking equal, bit for bit, those that are read in one pass over the whole file."""
    film = OpenVideo(io.BytesIO(data), 16_000_000)
    one_pass, times = film.read(film.times, SIZE), []
    with av.open(io.BytesIO(data)) as container:
        for i, decoded in enumerate(container.decode(video=0)):
            times.append(i if film._numbered else decoded.pts)
            if i % 10 == 0:  # and they are the right ones
                picture = fit(decoded.to_ndarray(format="rgb24"), SIZE).astype(int)
                assert np.abs(picture - one_pass[times[-1]]).mean() < 5, i
    assert times == film.times.tolist()
    for start in range(len(times))[starts]:
        for distance in (1, 3):
            wanted = times[start : start + 4 * distance : distance]
            found = film.read(wanted, SIZE)
            assert sorted(found) == wanted
            for time in wanted:
                np.testing.assert_array_equal(found[time], one_pass[time])
    film.close()


# --- frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VIDEOS)
def test_every_start_is_exact(name):
    check_every_start(video_file(name), slice(None))


def test_every_start_of_real_videos_is_exact(real_data):
    """H.264 in Matroska and MP4; MPEG-1 program streams, which have no index."""
    with tarfile.open(real_data / "video" / "clips.tar") as tar:
        members = tar.getmembers()
        for member, step in ((members[0], 31), (members[20], 9), (members[-2], 101), (members[-1], 301)):
            file = tar.extractfile(member)
            assert file is not None
            check_every_start(file.read(), slice(5, None, step))


def test_far_frames_in_one_call():
    film = OpenVideo(io.BytesIO(video_file(frames=60)), 16_000_000)
    everything = film.read(film.times, SIZE)
    for wanted in ([0, 59], [1, 2, 30, 50], [11, 12, 13, 47]):
        found = film.read(film.times[wanted], SIZE)
        assert sorted(found) == film.times[wanted].tolist()
        for time, picture in found.items():
            np.testing.assert_array_equal(picture, everything[time])


def test_no_more_is_decoded_than_needed(monkeypatch):
    decoded = []
    original = OpenVideo._decoded
    monkeypatch.setattr(
        OpenVideo, "_decoded", lambda self, *given: (decoded.append(x) or x for x in original(self, *given))
    )
    data = video_file(frames=60)  # a key frame every 12
    Clips(frames=4, size=SIZE)(data, None)
    assert len(decoded) <= 12 + 4
    decoded.clear()
    Clips(frames=4, size=SIZE, count=2)(data, None)  # at both ends
    assert len(decoded) <= 4 + 12
    decoded.clear()
    Clips(frames=4, size=SIZE, count=30)(data, None)  # close to each other: one pass
    assert len(decoded) <= 60


def picks(reader: Clips, count: int, rng=None, **video) -> list[list[int]]:
    """Which frames each clip has, told by their colours."""
    clip = reader(video_file(frames=count, **video), rng)["video"]
    mean = np.stack([fit(frame(i), SIZE).mean((0, 1)) for i in range(count)])
    clips = clip if clip.ndim == 5 else clip[None]
    return [[int(np.abs(mean - f.mean((0, 1))).sum(1).argmin()) for f in one] for one in clips]


def test_which_frames():
    assert picks(Clips(4, SIZE), 40) == [[18, 19, 20, 21]]
    assert picks(Clips(4, SIZE, stride=3), 40) == [[15, 18, 21, 24]]
    assert picks(Clips(2, SIZE, count=3), 40) == [[0, 1], [19, 20], [38, 39]]
    assert picks(Clips(6, SIZE), 3) == [[0, 1, 2, 2, 2, 2]]
    assert picks(Clips(4, SIZE, fps=5), 40) == [[12, 17, 22, 27]]  # of 25 a second
    assert picks(Clips(4, SIZE, fps=50), 40) == [[18, 18, 19, 19]]  # of two as near, the earlier
    assert picks(Clips(3, SIZE, fps=10, stride=2), 40, name="vp9.webm") == [[14, 19, 24]]
    assert picks(Clips(5, SIZE, fps=25), 2) == [[0, 1, 1, 1, 1]]


def test_time_stamps_rule_not_numbers():
    """A film whose frames are shown for 1, 2, 3, 4, 1, 2, ... ticks: at fps, a frame shown for long comes often."""
    ticks = [*itertools.accumulate(itertools.islice(itertools.cycle((1, 2, 3, 4)), 39), initial=0)]
    (clip,) = picks(Clips(20, SIZE, fps=25), 40, times=ticks, name="open groups.mkv")
    start = ticks.index(ticks[clip[0]])
    nearest = [min(range(40), key=lambda i, t=ticks[start] + k: (abs(ticks[i] - t), i)) for k in range(20)]
    assert clip == nearest


def test_random_starts_cover_the_video():
    data = video_file(frames=30)
    film = OpenVideo(io.BytesIO(data), 16_000_000)
    for reader in (Clips(8, SIZE), Clips(8, SIZE, fps=25)):
        starts = [reader._starts(film, np.random.default_rng(seed))[0] for seed in range(300)]
        assert set(starts) == set(range(23))
    one, same = (Clips(4, SIZE, count=2)(data, np.random.default_rng(5))["video"] for _ in range(2))
    np.testing.assert_array_equal(one, same)
    assert (one[0] != one[1]).any()


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 48, 100])
def test_pixels_are_those_of_pictures(size):
    """Against OpenCV's area or cubic resizing of what was encoded."""
    y, x = np.mgrid[:48, :64]
    smooth = np.stack([x * 3, y * 4, 128 + 40 * np.sin(x / 9 + y / 7)], -1).astype(np.uint8)
    found = Clips(1, size)(video_file(pictures=[smooth] * 3), None)["video"][0].astype(int)
    expected = fit(smooth, size).astype(int)
    assert np.abs(found - expected).mean() < 3
    assert np.abs((found - expected).mean()) < 2


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotated_videos_stand_upright(rotation):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = (255, 0, 0)
    picture[24:, 32:] = (0, 255, 0)
    upright = Clips(1, 32)(video_file(pictures=[picture] * 2), None)["video"][0]
    turned = Clips(1, 32)(video_file(pictures=[picture] * 2, rotation=rotation), None)["video"][0]
    assert (turned != upright).any()
    np.testing.assert_array_equal(turned, np.rot90(upright, rotation // 90))


def test_wide_pixels():
    """Anamorphic: 48 x 48 pixels twice as wide as high are a picture of 96 x 48."""
    picture = np.zeros((48, 48, 3), np.uint8)
    picture[:, 12:36] = 255  # the middle half: the central square of the picture
    found = Clips(1, 24)(video_file(pictures=[picture] * 2, sample_aspect_ratio=Fraction(2, 1)), None)["video"][0]
    assert found[:, 2:-2].mean() > 240
    assert Clips(1, 24)(video_file(pictures=[picture] * 2), None)["video"][0][:, :4].mean() < 15


@pytest.mark.parametrize(("colorspace", "red"), [(1, 54), (6, 76)])
def test_colours_follow_their_standard(colorspace, red):
    """Luma of pure red is 0.2126 of white in BT.709 and 0.299 in BT.601: read by the wrong one, red is off by 20."""
    picture = np.full((48, 64, 3), (255, 0, 0), np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, 1
        coded = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format="yuv420p", dst_colorspace=colorspace if colorspace == 1 else 5, dst_color_range=1
        )
        luma = coded.to_ndarray()[:48].mean()
        assert abs(luma - (16 + 219 * red / 255)) < 3
        coded.pts = 0
        container.mux(stream.encode(coded))
        container.mux(stream.encode())
    found = Clips(1, 16)(file.getvalue(), None)["video"][0].reshape(-1, 3).mean(0)
    np.testing.assert_allclose(found, (255, 0, 0), atol=6)


# --- sound ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h264.mp4", "open groups.mkv", "mpeg2.mpg", "mpeg2.ts"])
def test_the_sound_belongs_to_the_clip(name):
    sound = melody(2.4)
    data = video_file(name, frames=60, sound=sound)
    reader = Clips(10, SIZE, fps=25, count=4, audio=Waveform(0.4, rate=44_100))
    film = OpenVideo(io.BytesIO(data), 16_000_000)
    for rng in (None, np.random.default_rng(0)):
        same = None if rng is None else np.random.default_rng(0)
        found = reader(data, rng)
        for start, heard in zip(reader._starts(film, same), found["audio"], strict=True):
            at = round(film.seconds[start] * 44_100)
            inner, around = heard[4_000:12_000], np.pad(sound.mean(1), (4_000, 30_000))[at + 5_600 : at + 18_400]
            score = scipy.signal.correlate(around, inner, "valid") / np.linalg.norm(inner)
            score /= np.sqrt(scipy.signal.correlate(around**2, np.ones_like(inner), "valid"))
            best = int(np.argmax(score)) - 2_400
            assert max(score) > 0.97
            assert abs(best) <= 1_200, best  # muxers delay the track by up to a frame of the codec


def test_the_sound_of_real_videos_is_that_of_their_wav_files(real_data):
    with tarfile.open(real_data / "video" / "audio.tar") as tar:
        files = {m.name.split(".")[0]: tar.extractfile(m) for m in tar.getmembers()[:4]}
        waves = {k: soundfile.read(io.BytesIO(f.read()), dtype="float32")[0] for k, f in files.items() if f}
    reader = Clips(25, SIZE, fps=25, count=3, audio=Waveform(1.0))
    source = Tar(str(real_data / "video" / "clips.tar"))
    for i in range(len(source)):
        record = source[i]
        if record["key"] in waves:
            heard, wave = reader(record["video"], None)["audio"], np.pad(waves[record["key"]], (500, 20_000))
            for start, one in zip((0, 25, 50), heard, strict=True):
                at = 500 + start * 640
                score = [
                    np.corrcoef(one[400:15_000], wave[at + 400 + s : at + 15_000 + s])[0, 1] for s in range(-40, 41)
                ]
                assert max(score) > 0.99
                assert abs(int(np.argmax(score)) - 40) <= 2  # of 16 kHz


def test_silent_videos():
    silent = Clips(4, SIZE, audio=Waveform(0.1, channels=2), silent="zeros")
    assert not silent(video_file(), None)["audio"].any()
    with pytest.raises(BadSample, match="no sound track; silent='zeros'"):
        Clips(4, SIZE, audio=Waveform(0.1))(video_file(), None)


# --- arrays, shapes, configs ----------------------------------------------------------------------


def test_frames_that_lie_there():
    pictures = np.stack([frame(i) for i in range(20)])
    reader = Clips(3, SIZE, stride=2, count=2)
    expected = np.stack([[fit(pictures[i], SIZE) for i in clip] for clip in ((0, 2, 4), (15, 17, 19))])
    np.testing.assert_array_equal(reader(pictures, None)["video"], expected)
    coded = tuple(cv2.imencode(".png", f[..., ::-1])[1].tobytes() for f in pictures)
    np.testing.assert_array_equal(reader(coded, None)["video"], expected)


@pytest.mark.parametrize(
    "reader", [Clips(4, 16), Clips(2, 16, count=3, audio=Waveform(0.1, channels=2)), Clips(2, 16, audio=Waveform(0.1))]
)
def test_blank_has_the_shapes_of_a_sample(reader):
    found = reader(video_file(sound=melody(1.6)), np.random.default_rng(0))
    blank = reader.blank()
    assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {k: (v.shape, v.dtype) for k, v in found.items()}


def test_configs():
    fields = {"type": "Clips", "frames": 8, "size": 32, "fps": 16, "audio": {"seconds": 0.5}}
    assert build(Clips, fields) == Clips(8, 32, fps=16.0, audio=Waveform(0.5))
    for wrong, message in (
        ({"frames": 0}, "at least 1"),
        ({"fps": 0.0}, "fps must be above 0"),
        ({"audio": Waveform(0.5, count=2)}, "Clips.count"),
        ({"audio": Waveform(2.0), "fps": 16.0}, r"last 0.5 s, but audio.seconds is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Clips(**({"frames": 8, "size": 32} | wrong))


# --- through sources and the stream ----------------------------------------------------------------


@pytest.mark.parametrize("loader", [Loader(threads=0), Loader(threads=2), Loader(threads=0, cache=True)])
def test_a_folder_in_batches(tmp_path, loader):
    for i, name in enumerate(("h264.mp4", "vp9.webm", "mpeg2.mpg", "mpeg4.avi")):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"class{i % 2}" / f"{i}.{name.split('.')[1]}").write_bytes(video_file(name))
    (tmp_path / "class0" / "text.mp4").write_text("hello")
    source, transform = Folder(str(tmp_path)), HostTransform(readers={"video": Clips(4, SIZE, stride=2)})
    given = {"batch_size": 5, "seed": 0}
    batch = next(train_batches(source, transform, **given, loader=loader))
    reference = next(train_batches(source, transform, **given, loader=Loader(threads=0)))
    assert batch["video"].shape == (5, 4, SIZE, SIZE, 3)
    assert batch["replaced"].sum() >= 1
    for name, value in reference.items():
        np.testing.assert_array_equal(batch[name], value)
    masked = next(eval_batches(source, transform, batch_size=5, loader=loader))["mask"]
    assert masked.sum() == 4
