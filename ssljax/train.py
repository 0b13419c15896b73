"""The training loop. One for all methods; it knows none of them by name."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from ssljax.checkpoint import CheckpointStore, abstract_like
from ssljax.config import Experiment, resolve, with_precision
from ssljax.data import Batches, HostTransform, train_batches
from ssljax.data.stream import check_bad_fraction
from ssljax.describe import describe
from ssljax.diagnose import first_not_finite
from ssljax.encode import Encoder, Pixels
from ssljax.evals.collapse import collapse
from ssljax.evals.online import Classification
from ssljax.guard import choose, why_refused
from ssljax.mesh import batch_sharding, check_batch_size, global_batch, process_rows, shardings
from ssljax.method import Context
from ssljax.metrics import MetricLog, peak_flops
from ssljax.optim import make_optimizer
from ssljax.preemption import Preempted, StopSignal
from ssljax.rules import leaf_name
from ssljax.soundness import Soundness
from ssljax.state import Progress, TrainState
from ssljax.watchdog import Watchdog

DIAGNOSED_ROWS = 256  # of a batch, for the collapse diagnostics


class DivergedError(ArithmeticError):
    """Steps were refused again and again; the message names the step, the term of the loss and the layer."""


@dataclass(frozen=True)
class Result:
    """What a run returns: the final state, and the last value of each `eval/...` (and `pixels/...`) metric."""

    state: TrainState
    metrics: dict[str, float]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Notes:
    """What a step tells the loop beside its metrics."""

    tally: jax.Array  # int32 [3]: step refused (0, 1); bad records replaced; rows whose process wants to stop
    limits: dict[str, jax.Array]  # that loss and gradient norm were held against
    gradients: jax.Array  # float32 [leaves]: the norm of each parameter's gradient
    embeddings: tuple[jax.Array, ...]  # float32 [rows, D] each, for the collapse diagnostics


class Run:
    """Everything a config determines: mesh, transforms, shapes, optimiser, functions. Holds no training state."""

    def __init__(
        self,
        experiment: Experiment,
        devices: Sequence[Any] | None = None,
        batch_shapes: dict[str, jax.ShapeDtypeStruct] | None = None,
    ):
        self.config = resolve(experiment)
        self.experiment = e = with_precision(experiment, {"bf16": "bfloat16"}.get(experiment.precision))
        self.mesh = e.mesh.create(devices)
        check_batch_size(e.batch_size, self.mesh, e.micro_batches)
        self.rows = process_rows(e.batch_size, self.mesh)
        self.train_transform = HostTransform(e.data.size, e.data.views.host_crops, e.data.tokenizer)
        self.eval_transform = HostTransform(e.data.size, e.data.eval_view.host_crops, e.data.tokenizer)
        self.batch_shapes = batch_shapes or self._read_batch_shapes()
        self.init_key, self.step_key = jax.random.split(jax.random.key(e.seed))
        params = jax.eval_shape(self._init_method)[0]
        self.optimizer = make_optimizer(e.optim, params, e.steps, e.batch_size)
        self.state_shapes = jax.eval_shape(self._init)
        self.state_shardings = shardings(self.state_shapes, self.mesh, e.mesh.min_size)

    def init(self) -> TrainState:
        """A fresh state, each leaf made where it lives: no device or host ever holds the full tree."""
        # It runs once, and XLA:CPU takes seconds to optimise it.
        fast = {"xla_backend_optimization_level": 0} if self.mesh.devices.flat[0].platform == "cpu" else None
        return jax.jit(self._init, out_shardings=self.state_shardings, compiler_options=fast)()

    def batches(self, start: int, bad_log: epath.Path | None = None) -> Batches:
        """This process's rows of the training batches from sample position `start` on."""
        e = self.experiment
        return train_batches(
            e.data.train,
            self.train_transform,
            batch_size=e.batch_size,
            seed=e.seed,
            start=start,
            rows=self.rows,
            loader=e.data.loader,
            bad_log=bad_log,
        )

    def place(self, rows: dict[str, np.ndarray], stop: bool = False) -> dict[str, jax.Array]:
        """This process's rows (of `batches`) as the global batch on the devices.

        With `stop` the batch carries this process's wish to stop, so that all processes hear of it at the same step.
        """
        rows = {**rows, "stop": np.full(len(rows["index"]), stop)}
        return global_batch(rows, self.experiment.batch_size, self.mesh)

    def gradient(self, state: TrainState, batch: dict[str, jax.Array]) -> Any:
        """`((loss, (method state, metrics)), gradients)` of a global batch."""
        e = self.experiment
        view_key, loss_key = jax.random.split(jax.random.fold_in(self.step_key, state.step))
        ctx = self._context(state, loss_key)
        views = e.data.views(view_key, {name: x for name, x in batch.items() if name not in ("replaced", "stop")})

        def loss_of(params):
            return e.method.loss(params, state.method, views, ctx)

        return jax.value_and_grad(loss_of, has_aux=True)(state.params)

    def step(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array], Notes]:
        """One optimisation step on a global batch (to be jitted): views, loss, gradient, guard, update.

        A refused step returns the state as it was. The metrics are float scalars.
        """
        e = self.experiment
        (loss, (method_state, found)), grads = self.gradient(state, batch)
        norms = jnp.stack([optax.tree.norm(x) for x in jax.tree.leaves(grads)])
        metrics = {
            **{name: value for name, value in found.items() if name != "embeddings"},
            "loss": loss,
            "grad_norm": jnp.sqrt(jnp.sum(norms**2)),
            "learning_rate": e.optim.lr_schedule(e.steps, e.batch_size)(state.step),
        }
        take, guard, limits = e.guard.judge(state.guard, loss, metrics["grad_norm"], metrics)
        updates, opt = self.optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        _, loss_key = jax.random.split(jax.random.fold_in(self.step_key, state.step))
        params, method_state = e.method.update(params, method_state, self._context(state, loss_key))
        average: Any = None if state.ema is None else optax.incremental_update(params, state.ema, 1 - e.optim.ema)
        following = TrainState(state.step + 1, params, opt, method_state, average, guard)
        tally = jnp.stack([~take, batch["replaced"].sum(), batch["stop"].sum()]).astype(jnp.int32)
        embeddings = tuple(_some_rows(x.astype(jnp.float32)) for x in found.get("embeddings", ()))
        return choose(take, following, state), metrics, Notes(tally, limits, norms, embeddings)

    def _context(self, state: TrainState, key: jax.Array) -> Context:
        e = self.experiment
        return Context(key, state.step, state.step / e.steps, e.micro_batches)

    def compile_step(self, platform: str | None = None) -> Any:
        """The compiled training step; the state is donated.

        `platform` (of `jax.lax.platform_dependent` code) is that of the devices unless it is given.
        """
        state = abstract_like(self.state_shapes, self.state_shardings)
        batch = abstract_like(self.batch_shapes, {name: batch_sharding(self.mesh) for name in self.batch_shapes})
        replicated = NamedSharding(self.mesh, PartitionSpec())
        step = jax.jit(self.step, donate_argnums=0, out_shardings=(self.state_shardings, replicated, replicated))
        return step.trace(state, batch).lower(lowering_platforms=(platform,) if platform else None).compile()

    def encoder(self, method: Any = None) -> Encoder:
        """The frozen encoder of the run's method (or of another with `features`)."""
        e = self.experiment
        loader = replace(e.data.loader, cache=False)
        size = min(256, e.batch_size)
        return Encoder(method or e.method, e.data.eval_view, self.eval_transform, self.mesh, size, loader)

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint records beside the state: the resolved config, and the shapes of a batch."""
        return {
            "config": self.config,
            "batch": {name: [list(x.shape), x.dtype.name] for name, x in self.batch_shapes.items()},
        }

    def _read_batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch as it reaches the device, from one sample of the source; without one, assumed."""
        e = self.experiment
        if e.data.train is None:
            sample = {
                **self.train_transform.blank(),
                **{name: np.zeros((), np.int32) for name in ("index", "replaced")},
            }
        else:
            serial = replace(e.data.loader, threads=0, workers=0, cache=False)
            batch = next(train_batches(e.data.train, self.train_transform, batch_size=1, seed=0, loader=serial))
            sample = {name: x[0] for name, x in batch.items()}
        sample["stop"] = np.zeros((), bool)
        return {name: jax.ShapeDtypeStruct((e.batch_size, *x.shape), x.dtype) for name, x in sample.items()}

    def _init_method(self):
        key = jax.random.key(0)
        views = jax.eval_shape(self.experiment.data.views, key, self.batch_shapes)
        one_row = {name: jnp.zeros((1, *x.shape[1:]), x.dtype) for name, x in views.items()}
        return self.experiment.method.init(self.init_key, one_row)

    def _init(self) -> TrainState:
        params, method_state = self._init_method()
        average = None if self.experiment.optim.ema is None else params
        guard = self.experiment.guard.init()
        return TrainState(jnp.int32(0), params, self.optimizer.init(params), method_state, average, guard)


def train(
    experiment: Experiment,
    workdir: epath.PathLike,
    *,
    wandb: str | None = None,
    profile: tuple[int, int] | None = None,
    devices: Sequence[Any] | None = None,
) -> Result:
    """Runs an experiment to its last step, resuming from the newest good checkpoint in `workdir` if there is one.

    Args:
      wandb: project to log to, if any.
      profile: (first, last) step to trace into `<workdir>/profile`.

    Raises:
      Preempted: SIGTERM came; the run saved and can be continued.
      DivergedError: steps were refused again and again, also from earlier checkpoints. StateError: the state is
        damaged, and where. CheckpointError, ConfigError, ValueError: with what to change.
    """
    workdir = epath.Path(workdir)
    if experiment.data.train is None:
        raise ValueError("data.train is not set: name your pictures, for example data.train=folder:/my/images")
    run = Run(experiment, devices)
    e = run.experiment
    soundness = Soundness(run.state_shapes, run.state_shardings, run.mesh)
    with jax.set_mesh(run.mesh), StopSignal() as stop, CheckpointStore(workdir, e.checkpoint) as store:
        # 1. State: the newest checkpoint of this workdir, or a fresh one.
        like = abstract_like(run.state_shapes, run.state_shardings)
        state, progress, metadata = _start(run, store, like)
        start = int(state.step)
        with (
            MetricLog(workdir, e.steps, start, progress.records, wandb, run.config) as log,
            Watchdog(workdir, jax.process_index(), jax.process_count(), log.say, e.heartbeats) as watch,
        ):
            describe(log, run, workdir, start, metadata and metadata["config"])
            watch.at("compile", start)
            began = time.perf_counter()
            step_fn = run.compile_step()
            log.say(f"compiled the training step in {time.perf_counter() - began:.1f} s")
            evaluate, meter = _Evaluator(run, log), _Meter(step_fn, e.batch_size, run.mesh)
            flight = _Flight(run, log, meter, progress, start)
            bad_log = workdir / "bad_samples.jsonl"
            batches = run.batches(progress.position, bad_log)

            def save() -> None:
                watch.at("save", flight.step)
                soundness.check_finite(state)
                if soundness.has_copies:
                    soundness.check_copies(state)
                progress.rewinds, progress.records = 0, log.records
                store.save(state, flight.step, asdict(progress), run.metadata())

            def due(every: int | None) -> bool:
                return bool(every) and flight.step % every == 0 and flight.step > start

            # 2. The loop. Its order is fixed: evaluation and checkpoint see exactly the state and the data position of
            #    `flight.step`; only then is the next batch taken. A step is looked at when the next one is under way.
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
                        watch.at("diagnosis", flight.step)
                        raise DivergedError(flight.diagnosis(state))
                    progress.rewinds, progress.in_a_row = progress.rewinds + 1, 0
                    store.wait()
                    state, before, _ = _start(run, store, like)
                    progress.evaluated = before.evaluated
                    log.incident(
                        flight.step,
                        "rewind",
                        f"{e.guard.in_a_row} steps in a row were refused after step {flight.step}: going back to step "
                        f"{int(state.step)}, and on with the data from sample {progress.position:,}",
                    )
                    log.rewind(before.records)
                    saved = flight.step = int(state.step)
                    continue
                if comparing:
                    watch.at("compare replicas", flight.step)
                    soundness.check_copies(state)
                if flight.stop:
                    if saved != flight.step:
                        save()
                    store.wait()
                    raise Preempted(f"told to stop; saved at step {flight.step}. The same command continues from there")
                if evaluating:
                    watch.at("eval", flight.step)
                    progress.evaluated = flight.step
                    evaluate(flight.step, state)
                    meter.restart()
                if saving:
                    saved = flight.step
                    save()
                if finished:
                    break
                _profile(profile, flight.step, workdir)
                with jax.transfer_guard("disallow"):
                    watch.at("data wait", flight.step)
                    with meter.waiting():
                        rows = next(batches)
                    watch.at("step", flight.step)
                    state, metrics, notes = step_fn(state, run.place(rows, stop.received))
                    progress.position += e.batch_size
                    flight.add(metrics, notes, rows)
                    flight.land(leave=1)
            _profile(profile, e.steps, workdir)
            if progress.bad:
                log.say(f"{progress.bad} of {progress.position} samples were bad and replaced; see {bad_log}")
            if progress.refused:
                log.say(f"{progress.refused} steps were refused; see {workdir / 'metrics.jsonl'}")
    return Result(state, evaluate.results)


def _start(run: Run, store: CheckpointStore, like: TrainState) -> tuple[TrainState, Progress, dict[str, Any] | None]:
    """State, progress and metadata of the newest checkpoint; of a fresh run without one."""
    if not store.steps():
        return run.init(), Progress(), None
    found = store.restore(like)
    return found.state, Progress(**found.progress), found.metadata


class _Flight:
    """Steps sent to the devices and not looked at yet. Looking waits for the device, so it happens a step late.

    `step` counts the steps taken, those under way among them; a step that turns out refused is taken back. All that is
    decided here follows from arrays that are equal in all processes.
    """

    def __init__(self, run: Run, log: MetricLog, meter: "_Meter", progress: Progress, step: int):
        self.step, self.stop = step, False
        self._experiment, self._log, self._meter, self._progress = run.experiment, log, meter, progress
        self._run = run
        self._steps: deque[tuple[dict[str, Any], Notes, dict[str, np.ndarray], int]] = deque()
        self._diagnose = jax.jit(collapse)
        self._reason, self._rows = "", {}  # of the latest refused step
        self._gradients = np.zeros(0)

    @property
    def under_way(self) -> bool:
        """Whether any step has not been looked at."""
        return bool(self._steps)

    @property
    def refused_too_often(self) -> bool:
        """Whether the guard's patience is at its end."""
        return self._progress.in_a_row >= self._experiment.guard.in_a_row

    def add(self, metrics: dict[str, Any], notes: Notes, rows: dict[str, np.ndarray]) -> None:
        """A step was sent off."""
        self._steps.append((metrics, notes, rows, self._progress.position))
        self.step += 1

    def land(self, leave: int = 0) -> None:
        """Looks at steps, oldest first, until so many are left: counts, writes the log's records, refusals."""
        progress, e = self._progress, self._experiment
        while len(self._steps) > leave:
            metrics, notes, rows, position = self._steps.popleft()
            refused, replaced, stop = jax.device_get(notes.tally).tolist()
            step = self.step - len(self._steps)  # of this one, if it was taken
            self.stop |= stop > 0
            progress.bad += replaced
            check_bad_fraction(progress.bad, position, e.data.loader.max_bad_fraction)
            if refused:
                self._refuse(step, metrics, notes, rows, position)
            else:
                progress.in_a_row = 0
                if step % e.log_every == 0 or step == e.steps:
                    self._write(step, metrics, notes)
            self._log.advance(self.step - len(self._steps))

    def diagnosis(self, state: TrainState) -> str:
        """What is known of the latest refused step: the term, the layer, the parameters with the largest gradients."""
        names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
        try:
            place = first_not_finite(self._run.gradient, state, self._run.place(self._rows))
        except Exception as error:  # it needs more memory than the compiled step
            place = f"the operation could not be found ({type(error).__name__}: {error})"
        largest = np.argsort(-np.nan_to_num(self._gradients, nan=np.inf), kind="stable")[:3]
        norms = ", ".join(f"{names[i]} {self._gradients[i]:.3g}" for i in largest)
        guard = self._experiment.guard
        return (
            f"step {self.step + 1}: {guard.in_a_row} steps in a row were refused, also after going back to the last "
            f"checkpoint {guard.rewinds} times: {self._reason}"
            + (f"; {place}" if place else "")
            + f". Largest gradients: {norms}. Training stopped; the checkpoints are good. Usual causes: a learning "
            "rate too high or without warm-up (optim.lr, optim.warmup), no gradient clipping (optim.clip), bad values in "
            "the input; or limits too narrow for this run (guard.gradient_factor, guard.spike_sigma)"
        )

    def _refuse(self, step: int, metrics: dict[str, Any], notes: Notes, rows: dict[str, Any], position: int) -> None:
        values, limits, self._gradients = jax.device_get((metrics, notes.limits, notes.gradients))
        self._progress.refused += 1
        self._progress.in_a_row += 1
        self.step -= 1
        self._rows, self._reason = rows, why_refused(values, limits)
        first = position - self._experiment.batch_size
        text = f"step {step} refused (samples {first:,} to {position - 1:,} of the stream): {self._reason}"
        self._log.incident(step, "refused", text)

    def _write(self, step: int, metrics: dict[str, Any], notes: Notes) -> None:
        values = dict(metrics)
        if notes.embeddings:
            values |= {f"collapse/{name}": value for name, value in self._diagnose(*notes.embeddings).items()}
        counts = {"bad_samples": self._progress.bad, "refused_steps": self._progress.refused}
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        self._log.step(step, values | self._meter.read() | counts)


def _some_rows(x: jax.Array) -> jax.Array:
    """Rows for the diagnostics, evenly spaced: every device has some at hand, where the first ones lie on few."""
    count = min(DIAGNOSED_ROWS, len(x))
    every = len(x) // count
    return x[: count * every].reshape(count, every, -1)[:, 0]


class _Meter:
    """Throughput between log steps: images/s, share of time spent waiting for data, model FLOP/s and MFU."""

    def __init__(self, step_fn: Any, batch_size: int, mesh: jax.sharding.Mesh):
        # XLA counts the program of one device.
        self._flops = float((step_fn.cost_analysis() or {}).get("flops", 0.0))
        self._batch, self._devices, self._peak = batch_size, mesh.size, peak_flops(mesh.devices.flat[0])
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew: what came before (compilation, evaluation) is not training."""
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The figures since the last reading."""
        elapsed = time.perf_counter() - self._since
        per_second = self._steps / elapsed
        figures = {
            "images_per_second": per_second * self._batch,
            "images_per_second_per_device": per_second * self._batch / self._devices,
            "data_wait": self._waited / elapsed,
            "flops_per_second_per_device": per_second * self._flops,
        }
        if self._peak:
            figures["mfu"] = per_second * self._flops / self._peak
        self.restart()
        return figures


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
