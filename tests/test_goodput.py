"""Where the time goes: the clock, the records of sessions, goodput over all of them, and replays of failures."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
from small import quick_compilation, simclr, train_command  # noqa: F401

from ssljax.cli import main
from ssljax.failures import LLAMA3_RATE, Assumptions, Job, daly_interval, forecast, simulate
from ssljax.goodput import (
    PHASES,
    Clock,
    Record,
    Session,
    duration,
    process_age,
    read_sessions,
    run_goodput,
)
from ssljax.plan import Plan
from ssljax.report.numbers import time_spent
from ssljax.train import train

ROOT = Path(__file__).parent.parent
HOUR = 3_600.0


class Time:
    """A clock that tests turn."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("ssljax.goodput.perf_counter", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


def test_the_clock_counts_inner_phases_once(monkeypatch):
    t = Time(monkeypatch)
    clock = Clock(age=5.0)
    t.passes(1)
    with clock.phase("restore"):
        t.passes(2)
        with clock.phase("data wait"):
            t.passes(4)
        t.passes(8)
    clock.start_steps()
    t.passes(16)
    with suppress(ValueError), clock.phase("eval"):
        t.passes(32)
        raise ValueError
    with clock.phase("data wait") as wait:
        t.passes(64)
        wait.name = "step"
    expected = dict.fromkeys(("step", *PHASES), 0.0)
    expected |= {"start": 6, "restore": 10, "data wait": 4, "step": 80, "eval": 32}
    assert clock.seconds() == expected
    assert clock.goodput() == 0  # no step counted yet
    clock.steps, clock.lost_steps = 10, 4
    assert clock.goodput() == pytest.approx(0.6 * 80 / 132)


def test_the_process_knows_its_age():
    code = "import time; time.sleep(0.5); from ssljax.goodput import process_age; print(process_age(), time.time())"
    began = time.time()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    age, now = map(float, out.stdout.split())
    assert 0.5 <= age <= now - began + 0.05  # ticks are 10 ms
    assert process_age() >= age


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def record(started: float, first: int | None, last: int | None, end: str | None = None, **seconds: float) -> Record:
    seconds = {name.replace("_", " "): value for name, value in seconds.items()}
    steps = 0 if first is None or last is None else last - first
    return Record(started, started + sum(seconds.values()), first, last, None, steps, 0, seconds, end)


def test_goodput_counts_each_step_once():
    # 100 steps of 1 s, killed; again from step 80, preempted at 130; a crash before the loop; to the end at 200.
    sessions = [
        record(1_000, 0, 100, start=10, compile=20, step=100),
        record(1_200, 80, 130, "preempted", start=10, restore=5, step=50, save=5),
        record(1_300, None, None, "error: OSError", start=10),
        record(1_350, 130, 200, "finished", start=10, data_wait=10, step=70, eval=30),
    ]
    total = run_goodput(sessions)
    expected = {
        "step": 200,
        "lost": 20,
        "down": 70 + 30 + 40,
        "start": 40,
        "compile": 20,
        "restore": 5,
        "report": 0,
        "check": 0,
    }
    assert total.seconds == pytest.approx({**expected, "data wait": 10, "save": 5, "eval": 30})
    assert total.wall == pytest.approx(sessions[-1].ended - sessions[0].started)
    assert total.goodput == pytest.approx(200 / 470)
    assert str(total).startswith("goodput 42.6 % of 7:50 min in 4 sessions; down 2:20 min, start 40.0 s, eval 30.0 s")


def test_skipped_steps_are_lost_and_a_finished_run_is_not_down():
    first, second = record(0, 0, 10, "finished", step=10), record(1_000, 10, 30, "finished", step=40)
    second.steps, second.lost_steps = 25, 5  # five were taken back by a rewind
    total = run_goodput([first, second])
    assert (total.seconds["step"], total.seconds["lost"], total.seconds["down"]) == (10 + 32, 8, 0)
    assert total.wall == 50
    # A run that begins anew in the same folder loses everything, and no more than that.
    again = record(2_000, 0, 30, step=30)
    assert run_goodput([first, second, again]).seconds["lost"] == 50
    assert run_goodput([]).goodput == 0


def test_sessions_survive_broken_files(tmp_path):
    folder = tmp_path / "sessions"
    folder.mkdir()
    whole = json.dumps(asdict(record(5, 0, 3, step=3.0)))
    (folder / "b.json").write_text(whole)
    (folder / "c.new").write_text(whole)  # a writer was killed before it replaced the old one
    broken = (
        whole[:40],
        "",
        "[]",
        '{"started": "yesterday", "ended": 1}',
        whole.replace("3.0", "NaN", 1),
        '{"unknown": 1}',
        "[" * 100_000,
    )
    for i, text in enumerate((*broken, whole.replace('{"step": 3.0}', "5"), "\x00")):
        (folder / f"bad{i}.json").write_text(text)
    (folder / "bytes.json").write_bytes(b"\xff\xfe")
    assert [s.last_step for s in read_sessions(tmp_path)] == [3]
    assert read_sessions(tmp_path / "nowhere") == []
    assert "Goodput 100.0 %" in time_spent(tmp_path)
    assert "no record" in time_spent(tmp_path / "nowhere")


def test_session_file_is_rewritten_whole(tmp_path):
    with suppress(KeyError), Session(tmp_path, Clock(age=2.0)) as session:
        assert [s.first_step for s in read_sessions(tmp_path)] == [None]
        session.start_steps(7)
        session.clock.steps += 2
        session.reached(9)  # within a second of the last writing
        assert read_sessions(tmp_path)[0].last_step == 7
        raise KeyError("x")
    (found,) = read_sessions(tmp_path)
    assert (found.first_step, found.last_step, found.steps, found.end) == (7, 9, 2, "error: KeyError")
    assert found.ended - found.started == pytest.approx(sum(found.seconds.values()))
    assert found.started < time.time() - 2
    assert [path.suffix for path in (tmp_path / "sessions").iterdir()] == [".json"]


def test_a_killed_run_and_its_continuation(tmp_path, capsys):
    """The killed session ends with its last record; what the next one repeats is lost."""
    command = [sys.executable, "-m", "ssljax.cli", *train_command(tmp_path, "steps=100000", "checkpoint.every=25")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    try:
        deadline = time.time() + 120
        while not any((s.last_step or 0) > 30 for s in read_sessions(tmp_path)):
            assert time.time() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (killed,) = read_sessions(tmp_path)
    assert killed.end is None
    assert killed.seconds["start"] > 0.3  # the imports are in it
    assert min(killed.seconds["compile"], killed.seconds["step"], killed.seconds["save"]) > 0
    assert killed.seconds["restore"] < 0.5  # there was nothing
    assert killed.first_step_after is not None
    assert killed.seconds["compile"] < killed.first_step_after < killed.ended - killed.started
    assert killed.last_step is not None
    end = killed.last_step + 40
    train(simclr("batch_size=8", f"steps={end}", "checkpoint.every=25"), tmp_path, devices=jax.devices()[:1])
    killed, last = read_sessions(tmp_path)
    assert last.first_step is not None
    assert last.first_step % 25 == 0
    assert (last.last_step, last.steps, last.end) == (end, end - last.first_step, "finished")
    assert last.seconds["restore"] > 0
    total = run_goodput([killed, last])
    assert total.seconds["down"] > 0
    repeated = max(0, (killed.last_step or 0) - last.first_step)
    assert total.seconds["lost"] == pytest.approx(killed.seconds["step"] * min(1, repeated / killed.steps))
    assert total.wall == pytest.approx(last.ended - killed.started)
    assert f" of {duration(total.wall)} in 2 sessions; " in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.96, "1:00 min"), (3_599.6, "1:00 h"), (8_000, "2:13 h"), (3e5, "3.5 days")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# -------------------------------------------------------------------------------------------------------------- replays


def job(**changes) -> Job:
    given = {"steps": 6_000, "step": 60.0, "chips": 1, "stall": 300.0, "durable": 0.0, "downtime": 600.0, "rate": 1e-5}
    return Job(**{**given, **changes})


@pytest.mark.parametrize(("mtbf", "every"), [(24 * HOUR, 120), (6 * HOUR, 57), (900.0, 9), (HOUR, 1)])
def test_replays_take_the_time_that_theory_says(mtbf, every):
    """Poisson failures, also while restarting: M e^(R/M) (e^((work + save)/M) - 1) for each interval (Daly)."""
    j = job(rate=1 / mtbf, steps=every * 300)
    wall = j.steps * j.step / simulate(j, every, seeds=300).goodput
    theory = 300 * mtbf * math.exp(j.downtime / mtbf) * math.expm1((every * j.step + j.stall) / mtbf)
    assert abs(wall.mean() - theory) < 4 * wall.std() / math.sqrt(300)
    assert wall.mean() == pytest.approx(theory, rel=0.02)


@pytest.mark.parametrize(("mtbf", "minutes"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_daly_interval(mtbf, minutes):
    """The figures of his article, for saves of 5 minutes; and replays find nothing much better."""
    assert daly_interval(5.0, mtbf) == pytest.approx(minutes, abs=0.5)
    j = job(rate=1 / (60 * mtbf), steps=6_000 if mtbf > 15 else 600)
    at = simulate(j, round(daly_interval(5.0, mtbf))).goodput.mean()
    others = [simulate(j, max(1, round(minutes * factor))).goodput.mean() for factor in (0.25, 0.5, 2, 4)]
    assert at > max(others)


def test_without_failures_only_saves_cost():
    j = job(rate=0.0, steps=100, step=2.0, stall=3.0, durable=5.0)
    for every, saves in ((10, 10), (30, 4), (100, 1), (1_000, 1)):
        replay = simulate(j, every, seeds=2)
        assert replay.goodput == pytest.approx(200 / (200 + 3 * saves + 5))
        assert replay.save == pytest.approx(3 * saves + 5)
        assert not replay.lost.any()
        assert not replay.failures.any()
    # A save that is not durable holds up the next: 2 s of steps, but 5 s for the save.
    assert simulate(j, 1, seeds=2).save == pytest.approx(100 * 3 + 99 * (5 - 2) + 5)


def test_a_save_that_is_not_durable_does_not_count():
    """By hand: one failure at a known moment."""

    class Once:
        def __init__(self, moment: float):
            self.draws = iter([moment])

        def exponential(self, _: float, seeds: int) -> np.ndarray:
            return np.full(seeds, next(self.draws, math.inf))

    j = job(steps=40, step=1.0, stall=2.0, durable=5.0, downtime=7.0)  # saves stall 10..12, 22..24, durable at 17, 29
    for moment, kept, lost, stalls in (
        (16.9, 0, 14.9, 2.0),
        (17.1, 10, 5.1, 2.0),
        (23, 10, 10, 3),
        (28.9, 10, 14.9, 4.0),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np.random, "default_rng", lambda _, at=moment: Once(at))
            replay = simulate(j, 10, seeds=1)
        rest = (40 - kept) + 2 * (4 - kept // 10) + 5
        assert (replay.lost, replay.down, replay.failures) == pytest.approx((lost, 7, 1)), moment
        assert replay.save == pytest.approx(stalls + rest - (40 - kept)), moment
        assert 40 / replay.goodput == pytest.approx(moment + 7 + rest), moment


def test_replays_are_monotone_and_reproducible():
    base = job(durable=60.0)
    at = {name: [simulate(job(durable=60.0) if v is None else job(**{"durable": 60.0, name: v}), 60).goodput.mean()
                 for v in values] for name, values in (("rate", (0, 1e-6, 1e-5, 1e-4)), ("stall", (0.0, 60.0, 600.0)),
          ("durable", (0.0, 600.0, 3_000.0)), ("downtime", (0.0, 600.0, 6_000.0)))}  # fmt: skip
    for name, values in at.items():
        assert values == sorted(values, reverse=True), name
    again = [simulate(base, 60, seed=seed).goodput for seed in (3, 3, 4)]
    np.testing.assert_array_equal(again[0], again[1])
    assert (again[0] != again[2]).any()
    parts = simulate(base, 60)
    wall = base.steps * base.step + parts.lost + parts.save + parts.down
    np.testing.assert_allclose(base.steps * base.step / wall, parts.goodput)
    with pytest.raises(ValueError, match="at least 1"):
        simulate(base, 0)


def test_hopeless_jobs_end():
    replay = simulate(job(rate=1 / 60, steps=1_000), 1_000, seeds=3)
    assert replay.goodput.max() == 0


def test_llama3_rate():
    """54 days on 16,384 chips: 419 failures, and the replay takes no time."""
    j = job(chips=16_384, rate=LLAMA3_RATE, step=5.0, steps=54 * 86_400 // 5, stall=0.0, downtime=0.0)
    assert j.mtbf == pytest.approx(3.09 * HOUR, rel=0.01)
    assert simulate(j, 1).failures.mean() == pytest.approx(419, rel=0.02)


def plan(**changes) -> Plan:
    memory = {"parameters": 1e9, "optimizer": 2e9, "method state": 0.0, "average": 0.0, "temporaries": 1e9}
    given = {"config": "x", "overrides": (), "topology": "h100:4096", "chips": 4_096, "mesh": {}, "remat": {},
             "batch_size": 8, "micro_batches": 1, "in_parts": False, "steps": 100_000, "state": 3e9, "capacity": 80e9,
             "memory": memory, "flops": 1.0, "model_flops": 1.0, "seconds": {"compute": 0.5, "network": 0.5},
             "views": {}, "memory_traffic": 0.0, "collectives": (), "compile_seconds": 1.0, "notes": ()}  # fmt: skip
    return Plan(**{**given, **changes})


def test_forecast_of_a_plan():
    found = forecast(plan(), Assumptions.parse(["storage=3", "copy=1", "notice=0"]), save_every=777)
    assert found.job == Job(
        100_000, 1.0, 4_096, stall=3.0, durable=1.0, downtime=151.0, rate=pytest.approx(LLAMA3_RATE)
    )
    assert found.daly == round(daly_interval(3.0, found.job.mtbf))
    assert {1, 2, 500, 777, found.daly} <= {r.save_every for r in found.replays}
    assert all(found.best.goodput.mean() >= r.goodput.mean() for r in found.replays)
    assert 0.3 < found.best.save_every / found.daly < 3
    rows = json.loads(json.dumps(found.as_dict()))["intervals"]
    for row in rows:
        assert row["goodput"] + row["save"] + row["lost"] + row["down"] == pytest.approx(1)
        assert row["goodput_5"] <= row["goodput"] <= row["goodput_95"]
    assert forecast(plan(), Assumptions.parse(["rate=0"])).best.failures.max() == 0
    with pytest.raises(ValueError, match="no step time"):
        forecast(plan(seconds={}), Assumptions())


@pytest.mark.parametrize("word", ["storage", "storage=", "storage=0", "copy=-1", "rate=x", "restart=nan", "stroage=1"])
def test_wrong_assumptions_are_refused(word):
    with pytest.raises(ValueError, match="--assume"):
        Assumptions.parse([word])


def test_plan_prints_the_forecast(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    command = [
        "plan",
        *train_command(tmp_path)[1:3],
        "--topology",
        "h100:8",
        *train_command(tmp_path)[6:],
        "batch_size=8",
    ]
    out = tmp_path / "plan.json"
    options = ["--failures", "--save-every", "1", "--assume", "rate=1000", "--json", str(out)]
    assert main([*command, *options]) == 0
    text = capsys.readouterr().out
    for words in (
        "failures: 8 a day on 8 chips, one in 3:00 h",
        "Young/Daly",
        "--save-every",
        "rate=1e+03",
        "restart=120",
    ):
        assert words in text
    found = json.loads(out.read_text())
    assert found["failures"]["assumptions"]["rate"] == 1_000
    assert found["state"] > 0
    for wrong in (["--save-every", "5"], ["--assume", "rate=1"], ["--failures", "--save-every", "0"]):
        assert main([*command, *wrong]) == 1
        assert "--save-every" in capsys.readouterr().err
