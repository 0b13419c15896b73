"""`ssljax data bench`: every stage is timed, and the verdict follows from the figures."""

from dataclasses import replace

import pytest

from bench.chaos import write_shards
from ssljax.cli import main
from ssljax.data import Arrays, Tar
from ssljax.speed import Speed, measure

SPEED = Speed(
    read=1e5,
    decode=1000,
    crop=800,
    augment=400,
    loader={
        ("crop", "threads"): 1400,
        ("crop", "workers"): 1500,
        ("augment", "threads"): 500,
        ("augment", "workers"): 750,
    },
    device={"crop": 9000, "augment": 90_000},
    cores=2,
    bad=0,
)


def test_the_host_limits():
    expected = (
        "Views(host='crop'), data.loader.workers=2: the host limits, at 1,500 images/s; 79% of its time is decoding"
    )
    assert SPEED.limit == expected


def test_the_device_limits():
    slow = replace(SPEED, device={"crop": 100, "augment": 450})
    assert slow.limit == "Views(host='augment'), data.loader.threads=2: this device limits, at 450 images/s"


def test_a_slow_device_makes_the_host_finish_the_views():
    slow = replace(SPEED, device={"crop": 100, "augment": 90_000})
    assert slow.limit.startswith("Views(host='augment'), data.loader.workers=2: the host limits, at 750 images/s")


def test_stages_of_real_files(tmp_path, capsys):
    shards = write_shards(tmp_path)  # one picture is cut short
    assert main(["data", "bench", shards, "--size", "32", "--cores", "1", "--seconds", "0.1"]) == 0
    said = capsys.readouterr().out
    for words in ("decode, crop, colour, blur", "1 threads", "1 workers", "images/s", "1 of the records looked at"):
        assert words in said
    found = measure(Tar(shards.removeprefix("tar:")), "multi_crop", 32, cores=1, seconds=0.05)
    assert 0 < found.augment < found.crop < found.decode
    assert found.read > 0
    assert all(rate > 0 for rates in (found.loader, found.device) for rate in rates.values())
    assert found.bad == 1


def test_what_cannot_be_timed():
    with pytest.raises(ValueError, match="no recipe 'simclear'; did you mean 'simclr'"):
        measure(Arrays({"image": [b""]}), "simclear")
    with pytest.raises(ValueError, match="record 0 has no 'image'"):
        measure(Arrays({"text": ["a", "b"]}))
