"""Goodput before the run: failures at a published rate replayed against a save interval (`ssljax plan --failures`)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from ssljax.config import nearest
from ssljax.goodput import duration
from ssljax.plan import Plan

DAY = 86_400.0
# "The Llama 3 Herd of Models" (arXiv:2407.21783), section 3.3.4: 419 unexpected interruptions in 54 days of pretraining
# on 16,384 H100s. A failure of one chip stops all.
LLAMA3_RATE = 419 / (54 * DAY * 16_384)  # per chip and second
_MOST = 20_000  # failures of one replay; its goodput is then that of the part done


@dataclass(frozen=True)
class Job:
    """A run, what its saves cost and how often it fails."""

    steps: int
    step: float  # seconds of one
    chips: int
    stall: float  # seconds the loop stands still for a save
    durable: float  # seconds from then until the save can be restored; the next save waits for it
    downtime: float  # seconds from a failure to the first step after it
    rate: float = LLAMA3_RATE  # failures per chip and second

    @property
    def mtbf(self) -> float:
        """Mean seconds between failures of the whole job."""
        return 1 / (self.rate * self.chips) if self.rate else math.inf


@dataclass(frozen=True)
class Replay:
    """What came of a job that saves every `save_every` steps: an entry per seed, in seconds."""

    save_every: int
    goodput: np.ndarray  # share of the time in steps that count
    lost: np.ndarray  # steps done again
    save: np.ndarray  # the loop waiting for saves
    down: np.ndarray
    failures: np.ndarray  # number


def simulate(job: Job, save_every: int, seeds: int = 100, seed: int = 0) -> Replay:
    """Replays a job with failures drawn as a Poisson process, so many times.

    A failure sends the job back to the newest save that was durable when it came, after `downtime`; another failure
    within that starts it anew. The last step is followed by a save. The first start is not counted.
    """
    if save_every < 1:
        raise ValueError(f"save_every is a number of steps, at least 1, not {save_every}")
    rng = np.random.default_rng(seed)
    work = save_every * job.step
    first, period = work + job.stall, max(work, job.durable) + job.stall  # of the saves after a start: E, E + P, ...
    done, lost, save, down, failures = np.zeros((5, seeds))  # `done`: seconds of steps that a durable save holds
    total = job.steps * job.step
    recovery = np.zeros(seeds)
    running = np.ones(seeds, bool)
    while running.any() and failures.max() < _MOST:
        until_failure = rng.exponential(job.mtbf, seeds) if job.rate else np.full(seeds, math.inf)
        x = until_failure - recovery  # seconds of work before the failure; negative: it came during the recovery
        saves = np.ceil(np.round((total - done) / work, 6))
        last = total - done - (saves - 1) * work  # seconds of steps before the last save
        end = np.where(saves > 1, first + (saves - 2) * period + np.maximum(last, job.durable), last) + job.stall
        end += job.durable
        finishes = running & (x >= end)
        fails = running & ~finishes
        kept = np.clip(np.floor(1 + (x - job.durable - first) / period), 0, saves - 1)  # saves that were durable
        ended = np.clip(np.floor(1 + (x - first) / period), 0, saves - 1)
        since = x - np.where(ended > 0, first + (ended - 1) * period, 0.0)  # the last save stalled the loop
        worked = ended * work + np.clip(since, 0.0, np.where(ended == saves - 1, last, work))
        down += np.where(running, np.minimum(until_failure, recovery), 0.0)
        save += np.where(finishes, end - (total - done), np.where(fails, np.maximum(x, 0.0) - worked, 0.0))
        lost += np.where(fails, worked - kept * work, 0.0)
        done += np.where(finishes, total - done, np.where(fails, kept * work, 0.0))
        failures += fails
        recovery = np.full(seeds, job.downtime)
        running = fails
    return Replay(save_every, done / (done + lost + save + down), lost, save, down, failures.astype(int))


def daly_interval(save: float, mtbf: float) -> float:
    """Seconds of work between saves that cost `save` seconds each, for the least time in all (Daly, "A higher order
    estimate of the optimum checkpoint interval for restart dumps", 2006); in first order Young's sqrt(2 save mtbf)."""
    if save >= 2 * mtbf:
        return mtbf
    x = math.sqrt(save / (2 * mtbf))
    return math.sqrt(2 * save * mtbf) * (1 + x / 3 + x * x / 9) - save


# ------------------------------------------------------------------------------------------------------------ of a plan


@dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know, each with a round default; `--assume name=value` sets them."""

    rate: float = 1_000 * DAY * LLAMA3_RATE  # failures per 1,000 chips and day
    copy: float = 10.0  # GB/s from each chip to its host: the stall of a save
    storage: float = 2.0  # GB/s of the whole job, to write a checkpoint and to read it
    notice: float = 100.0  # seconds from a failure until the job is ended: the time-out of jax's heartbeats
    restart: float = 120.0  # seconds until the processes have started again and found each other
    compile: float = 30.0  # seconds to trace the step and to fetch it from a warm compilation cache

    @staticmethod
    def parse(words: Sequence[str]) -> "Assumptions":
        """From words `name=value`. Raises ValueError for what is none."""
        names, given = [f.name for f in fields(Assumptions)], {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in names:
                raise ValueError(f"--assume {word}: there is no {name!r}{nearest(name, names)}")
            try:
                given[name] = float(value)
            except ValueError:
                given[name] = math.nan
            if not given[name] >= 0 or (given[name] == 0 and name in ("copy", "storage")):
                raise ValueError(f"--assume {word}: {value!r} should be a {'positive ' * (name != 'rate')}number")
        return Assumptions(**given)


@dataclass(frozen=True)
class Forecast:
    """The goodput of a planned run for several save intervals."""

    job: Job
    state: float  # bytes of a checkpoint
    assumptions: Assumptions
    daly: int  # steps between saves by Daly's formula
    replays: tuple[Replay, ...]  # by interval, the shortest first

    @property
    def best(self) -> Replay:
        return max(self.replays, key=lambda replay: replay.goodput.mean())

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        rows = [_row(replay) for replay in self.replays]
        return {
            "job": asdict(self.job),
            "state": self.state,
            "assumptions": asdict(self.assumptions),
            "mtbf": self.job.mtbf,
            "daly": self.daly,
            "best": self.best.save_every,
            "intervals": rows,
        }


def forecast(plan: Plan, assumptions: Assumptions, save_every: int | None = None, seeds: int = 100) -> Forecast:
    """Replays a plan at save intervals of 1, 2, 5, 10, ... steps, at Daly's and at `save_every`.

    Raises:
      ValueError: the plan has no step time, as it does not fit.
    """
    if plan.slowest is None:
        raise ValueError("--failures: this plan has no step time (see above), so there is nothing to replay")
    a = assumptions
    saved = ("parameters", "optimizer", "method state", "average")
    transfer = plan.state / (1e9 * a.storage)
    job = Job(
        steps=plan.steps,
        step=plan.slowest,
        chips=plan.chips,
        stall=sum(plan.memory[name] for name in saved) / (1e9 * a.copy),
        durable=transfer,
        downtime=a.notice + a.restart + a.compile + transfer,
        rate=a.rate / (1_000 * DAY),
    )
    daly = min(plan.steps, max(1, round(daly_interval(job.stall, job.mtbf) / job.step))) if job.rate else plan.steps
    round_ones = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    # Longer intervals than a few times the MTBF are only ever waste, and take long to replay.
    tried = {n for n in round_ones if n < plan.steps and n * job.step < 4 * job.mtbf} | {daly, save_every or daly}
    replays = tuple(simulate(job, n, seeds) for n in sorted(tried))
    return Forecast(job, plan.state, assumptions, daly, replays)


def show(found: Forecast, save_every: int | None = None) -> Group:
    """The forecast as a table; `save_every` is marked."""
    job, a = found.job, found.assumptions
    table = Table("save every", "", "goodput", "5 % .. 95 %", "saving", "lost steps", "down")
    for column in table.columns:
        column.justify = "right"
    names = {"best": found.best.save_every, "Young/Daly": found.daly, "--save-every": save_every}
    table.add_column("")
    for replay in _shown(found, save_every):
        row = _row(replay)
        shares = [f"{100 * row[name]:.2f} %" for name in ("goodput", "save", "lost", "down")]
        spread = f"{100 * row['goodput_5']:.2f} .. {100 * row['goodput_95']:.2f}"
        every = f"{replay.save_every:,} steps", duration(replay.save_every * job.step)
        note = ", ".join(name for name, steps in names.items() if steps == replay.save_every)
        table.add_row(*every, shares[0], spread, *shares[1:], note)
    failures = found.best.failures
    low, high = np.quantile(failures, (0.05, 0.95))
    llama3 = Assumptions().rate
    return Group(
        f"failures: {DAY / job.mtbf:.3g} a day on {job.chips:,} chips, one in {duration(job.mtbf)}; "
        f"{failures.mean():.1f} in this run ({low:.0f} .. {high:.0f})",
        table,
        f"of {job.steps:,} steps of {1e3 * job.step:,.2f} ms (compute, memory and network taking turns), "
        f"{len(failures)} replays; a save stalls the loop {duration(job.stall)} and is durable {duration(job.durable)} "
        f"later; a failure costs {duration(job.downtime)} and the steps since the last durable save",
        f"assumed (--assume): rate={a.rate:.3g} failures per 1,000 chips and day (Llama 3 on H100: {llama3:.3g}); "
        f"a checkpoint of {found.state / 1e9:.2f} GB, copy={a.copy:g} GB/s from each chip, storage={a.storage:g} GB/s "
        f"for the job; notice={a.notice:g} s until a failure is seen, restart={a.restart:g} s until the processes are "
        f"back, compile={a.compile:g} s",
    )


def _shown(found: Forecast, save_every: int | None) -> list[Replay]:
    """The best and its neighbours, and those with a name."""
    best = found.replays.index(found.best)
    near = range(best - 4, best + 5)
    return [r for i, r in enumerate(found.replays) if i in near or r.save_every in (found.daly, save_every)]


def _row(replay: Replay) -> Mapping[str, Any]:
    """Means over the seeds as shares of the time, and the spread of the goodput."""
    useful = replay.goodput
    wall = (replay.lost + replay.save + replay.down) / np.maximum(1 - useful, 1e-12)
    shares = {name: float((getattr(replay, name) / wall).mean()) for name in ("save", "lost", "down")}
    low, high = np.quantile(useful, (0.05, 0.95))
    return {
        "save_every": replay.save_every,
        "goodput": float(useful.mean()),
        "goodput_5": float(low),
        "goodput_95": float(high),
        **shares,
        "failures": float(replay.failures.mean()),
    }
