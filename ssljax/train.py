"""The training loop. One for all methods; it knows none of them by name."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import jax
from etils import epath

from ssljax.checkpoint import CheckpointStore
from ssljax.config import Experiment
from ssljax.data import Batches
from ssljax.describe import describe, flatten
from ssljax.distributed import check_alike, gather_texts
from ssljax.encode import Pixels
from ssljax.evals.online import Classification
from ssljax.flight import DivergedError, Flight
from ssljax.goodput import Phase, Session, read_sessions, run_goodput
from ssljax.mesh import abstract_like
from ssljax.metrics import Meter, MetricLog
from ssljax.preemption import Preempted, StopSignal
from ssljax.run import Run
from ssljax.soundness import Soundness
from ssljax.state import Progress, TrainState
from ssljax.watchdog import Watchdog


@dataclass(frozen=True)
class Result:
    """What a run returns: the final state, and the last value of each `eval/...` (and `pixels/...`) metric."""

    state: TrainState
    metrics: dict[str, float]


def train(
    experiment: Experiment,
    workdir: epath.PathLike,
    *,
    wandb: str | None = None,
    profile: tuple[int, int] | None = None,
    devices: Sequence[Any] | None = None,
    session: Session | None = None,
) -> Result:
    """Runs an experiment to its last step, resuming from the newest good checkpoint in `workdir` if there is one.

    Args:
      wandb: project to log to, if any.
      profile: (first, last) step to trace into `<workdir>/profile`.
      session: the record of this process, where it began before this call; the caller ends it.

    Raises:
      Preempted: SIGTERM came; the run saved and can be continued.
      DivergedError: steps were refused again and again, also from earlier checkpoints. StateError: the state is
        damaged, and where. CheckpointError, ConfigError, ValueError (also where processes were started with different
        configs or data): with what to change.
    """
    workdir = epath.Path(workdir)
    if experiment.data.train is None:
        raise ValueError("data.train is not set: name your pictures, for example data.train=folder:/my/images")
    with ExitStack() as stack:
        session = session or stack.enter_context(Session(workdir))
        clock = session.clock
        run = Run(experiment, devices)
        e = run.experiment
        options = {name: repr(value) for name, value in flatten(run.config)}
        check_alike({"jax's version": jax.__version__, "the number of records": str(len(e.data.train)), **options})
        like = abstract_like(run.state_shapes, run.state_shardings)
        soundness = Soundness(run.state_shapes, run.state_shardings, run.mesh)
        stack.enter_context(jax.set_mesh(run.mesh))
        stop = stack.enter_context(StopSignal())
        store = stack.enter_context(CheckpointStore(workdir, e.checkpoint))

        def newest(report: Callable[[str], None]) -> tuple[TrainState, Progress, dict[str, Any] | None]:
            """State, progress and config of the newest good checkpoint; of a fresh run if there is none."""
            with clock.phase("restore"):
                found = store.resume(like, report)
            if found is None:
                return run.init(), Progress(), None
            return found.state, Progress(**found.progress), found.metadata["config"]

        bad_log = workdir / "bad_samples.jsonl"

        def read_from(progress: Progress) -> Batches:
            """The batches from there on; the first ones are read at once."""
            progress.sampling = e.data.sampling.continued(progress.sampling, progress.position)
            batches = stack.enter_context(closing(run.batches(progress.position, bad_log, progress.sampling)))
            batches.start()
            return batches

        # 1. State: the newest good checkpoint of this workdir, or a fresh one. Other threads compile and read.
        expected = Progress(**store.check_fits(like))
        batches = read_from(expected)
        compiling = stack.enter_context(ThreadPoolExecutor(1, "compile")).submit(run.compile_step)
        damages: list[str] = []
        state, progress, before = newest(damages.append)
        if progress.position != expected.position:  # the newest checkpoint was damaged
            batches.close()
            batches = read_from(expected := progress)
        progress.sampling = expected.sampling
        start = int(state.step)
        log = stack.enter_context(MetricLog(workdir, e.steps, start, progress.records, wandb, run.config))
        life = gather_texts(uuid4().hex)[0]
        watch = stack.enter_context(
            Watchdog(workdir, jax.process_index(), jax.process_count(), log.say, e.heartbeats, life=life)
        )
        describe(log, run, workdir, start, before)
        for damage in damages:
            log.incident(start, "checkpoint", damage)
        watch.at("compile", start)
        with clock.phase("compile"):
            step_fn = compiling.result()
        log.say(f"compiled the training step; waited for it {clock.seconds()['compile']:.1f} s")
        evaluate, meter = _Evaluator(run, log), Meter(step_fn, e.batch_size, run.mesh, clock)
        flight = Flight(run, log, meter, progress, start, bad_log)

        def at(phase: str) -> Phase:
            """The loop enters a phase: for the clock, and for the watchdog."""
            watch.at(phase, flight.step)
            return clock.phase(phase)

        def save() -> None:
            with at("save"):
                soundness.check_finite(state)
                if soundness.has_copies:
                    soundness.check_copies(state)
                progress.rewinds, progress.records = 0, log.records
                store.save(state, flight.step, asdict(progress), run.metadata())
            session.reached(flight.step)

        def due(every: int | None) -> bool:
            return bool(every) and flight.step % every == 0 and flight.step > start

        # 2. The loop. Its order is fixed: evaluation and checkpoint see exactly the state and the data position of
        #    `flight.step`; only then is the next batch taken. A step is looked at when the next one is under way.
        session.start_steps(start)
        saved = start
        while True:
            flight.stop |= stop.received and jax.process_count() == 1  # several have to agree: `Run.place`
            finished = flight.step == e.steps
            evaluating = (finished or flight.step == 0 or due(e.eval_every)) and progress.evaluated != flight.step
            saving = (finished or due(e.checkpoint.every)) and saved != flight.step
            comparing = due(e.guard.replicas_every) and soundness.has_copies
            if flight.under_way and (finished or evaluating or saving or comparing or flight.stop):
                flight.land()  # which may take a step back, or show that this is no step for any of them
                continue
            if flight.refused_too_often:
                flight.land()
            if flight.refused_too_often:
                if progress.rewinds == e.guard.rewinds:
                    with at("check"):
                        raise DivergedError(flight.diagnosis(state))
                progress.rewinds, progress.in_a_row = progress.rewinds + 1, 0
                with at("save"):
                    store.wait()
                with at("restore"):
                    state, then, _ = newest(lambda damage: log.incident(flight.step, "checkpoint", damage))
                progress.evaluated = then.evaluated
                log.incident(
                    flight.step,
                    "rewind",
                    f"{e.guard.in_a_row} steps in a row were refused after step {flight.step}: going back to step "
                    f"{int(state.step)}, and on with the data from sample {progress.position:,}",
                )
                log.rewind(then.records)
                saved = flight.step = int(state.step)
                continue
            if comparing:
                with at("check"):
                    soundness.check_copies(state)
            if flight.stop:
                if saved != flight.step:
                    save()
                with at("save"):
                    store.wait()
                session.end = "preempted"
                raise Preempted(f"told to stop; saved at step {flight.step}. The same command continues from there")
            if evaluating:
                progress.evaluated = flight.step
                with at("eval"):
                    evaluate(flight.step, state)
                meter.restart()
            if saving:
                saved = flight.step
                save()
            if finished:
                break
            _profile(profile, flight.step, workdir)
            with jax.transfer_guard("disallow"):
                with meter.waiting(), at("data wait") as wait:
                    rows = next(batches)
                    if flight.device_is_busy:  # and was all the while
                        wait.name = "step"
                watch.at("step", flight.step)
                state, metrics, notes = step_fn(state, run.place(rows, stop.received))
                progress.position += e.batch_size
                flight.add(metrics, notes, rows)
                if not clock.steps:
                    log.say(f"first step done {session.first_step_done(metrics):.1f} s after the start")
                flight.land(leave=1)
            session.stepped(flight.step)
        _profile(profile, e.steps, workdir)
        with at("save"):
            store.wait()
        if progress.bad:
            log.say(f"{progress.bad} of {progress.position} samples were bad and replaced; see {bad_log}")
        if progress.refused:
            log.say(f"{progress.refused} steps were refused; see {workdir / 'metrics.jsonl'}")
        session.end = "finished"
        session.write()
        log.say(str(run_goodput(read_sessions(workdir))))
    return Result(state, evaluate.results)


class _Evaluator:
    """Runs the config's evaluations. Those of step 0 are the random-initialisation figures all is compared with."""

    def __init__(self, run: Run, log: MetricLog):
        self._run, self._log = run, log
        self._encoder = run.encoder()
        self.results: dict[str, float] = {}

    def __call__(self, step: int, state: TrainState) -> None:
        evaluations = self._run.experiment.evals
        frozen = self._encoder.at(state.eval_params, state.method)
        pixels = self._run.encoder(Pixels()).at({}, {})
        values: dict[str, float] = {}
        for name, evaluation in evaluations.items():
            values |= {f"eval/{name}/{metric}": value for metric, value in evaluation.run(frozen).items()}
            if step == 0 and isinstance(evaluation, Classification):
                values |= {f"pixels/{name}/{metric}": value for metric, value in evaluation.run(pixels).items()}
        if values:
            self._log.write(step, values)
            shown = "  ".join(
                f"{name.removeprefix('eval/')} {value:.3f}"
                for name, value in values.items()
                if name.startswith("eval/")
            )
            self._log.say(f"step {step}: {shown}" + ("  (random initialisation)" if step == 0 else ""))
        self.results |= values


def _profile(steps: tuple[int, int] | None, step: int, workdir: epath.Path) -> None:
    if steps and step == steps[0]:
        jax.profiler.start_trace(str(workdir / "profile"))
    elif steps and step == steps[1]:
        jax.profiler.stop_trace()
