"""The command line: thin verbs, each a function elsewhere."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Heavy imports are inside the verbs: `ssljax --help` answers at once, and jax starts only after the processes have
# found each other.


def run() -> None:
    """The console script: `main`, on huge pages.

    XLA:CPU allocates and frees large buffers in every step, and the kernel needs a fifth of the time for them if pages
    are huge. glibc reads this setting only when a process starts, so the process starts once more.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, "-m", "ssljax.cli", *sys.argv[1:]])
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `ssljax`, which returns the exit status.

    Errors meant for people are printed without a traceback (status 1). A run that was told to stop and saved returns
    `preemption.AGAIN` (75), one that lost another of its processes `watchdog.LOST` (76): the same command continues it.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or not all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif rest:  # argparse takes positional arguments in one piece only; overrides may also stand between options
        options.overrides += rest
    from ssljax.checkpoint import CheckpointError
    from ssljax.config import ConfigError
    from ssljax.data.errors import BadSample
    from ssljax.preemption import AGAIN, Preempted
    from ssljax.watchdog import LOST, lost_contact

    try:
        options.verb(options)
    except Preempted as reason:
        print(f"ssljax: {reason}", flush=True)
        return AGAIN
    except Exception as error:
        # DivergedError and StateError are ArithmeticErrors.
        for_people = (CheckpointError, ConfigError, BadSample, ArithmeticError, ValueError, OSError, ImportError)
        lost = lost_contact(error)
        if options.traceback or not (lost or isinstance(error, for_people)):
            raise
        print(f"ssljax: {type(error).__name__}: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return LOST if lost else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssljax", description="Self-supervised and vision-language pretraining in JAX."
    )
    parser.add_argument("--traceback", action="store_true", help="show Python's traceback of errors")
    verbs = parser.add_subparsers(required=True, metavar="verb")

    train = verbs.add_parser("train", help="pretrain, or resume the run in --workdir")
    train.add_argument("--config", required=True, help="file and variant, e.g. configs/simclr.py:cifar10")
    train.add_argument("--workdir", required=True, help="folder of the run: checkpoints, metrics, report")
    train.add_argument(
        "--seeds", type=int, default=1, help="train this many seeds, one after another, in <workdir>/seed_<i>"
    )
    train.add_argument("--wandb", metavar="PROJECT", help="also log to Weights & Biases")
    train.add_argument(
        "--profile", metavar="FIRST:LAST", help="trace these steps with jax.profiler into <workdir>/profile"
    )
    train.add_argument("--no-report", action="store_true", help="do not write report.html at the end")
    train.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0 (SLURM, TPU pods and GKE are detected)"
    )
    train.add_argument("--processes", type=int, help="number of processes, with --coordinator")
    train.add_argument("--process", type=int, help="rank of this process, with --coordinator")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=0.1 data.train=folder:/my/images"
    )
    train.set_defaults(verb=_train)

    evaluate = verbs.add_parser("eval", help="evaluate a checkpoint, beside random initialisation")
    evaluate.add_argument("--workdir", required=True)
    evaluate.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    evaluate.add_argument("--config", help="take the evaluations of this config instead of the run's own")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of --config")
    evaluate.set_defaults(verb=_eval)

    embed = verbs.add_parser("embed", help="write features of a source to .npz or .parquet")
    embed.add_argument("--workdir", required=True)
    embed.add_argument("--source", required=True, help="e.g. folder:/my/images")
    embed.add_argument("--out", required=True, help="features.npz or features.parquet")
    embed.add_argument("--features", default="image", help="comma-separated names, e.g. image,patches")
    embed.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    embed.set_defaults(verb=_embed)

    check = verbs.add_parser("check", help="verify the files of all checkpoints of a run against their digests")
    check.add_argument("workdir")
    check.add_argument("--arrays", action="store_true", help="also load the arrays and verify theirs")
    check.set_defaults(verb=_check)

    report = verbs.add_parser("report", help="write <workdir>/report.html: curves, neighbours, PCA maps, diagnostics")
    report.add_argument("--workdir", required=True)
    report.add_argument("--source", help="pictures to show; the run's evaluation or training source by default")
    report.set_defaults(verb=_report)

    plan = verbs.add_parser("plan", help="compile the step for a pod that is not here: memory, traffic, time, MFU")
    plan.add_argument("--config", required=True, help="file and variant, e.g. configs/clip.py:paper")
    plan.add_argument("--topology", required=True, help="e.g. v5e:16x16, v5p:4x4x4 (v5p-128), v4:4x4x4, h100:64")
    plan.add_argument("--sweep", action="store_true", help="try mesh shapes and remat policies, and rank them")
    plan.add_argument(
        "--failures", action="store_true", help="replay failures at Llama 3's rate: goodput, save interval"
    )
    plan.add_argument("--save-every", type=int, metavar="N", help="with --failures: also saving every N steps")
    plan.add_argument(
        "--assume", action="append", default=[], metavar="NAME=VALUE", help="with --failures; it prints what it assumes"
    )
    plan.add_argument("--json", metavar="FILE", help="write everything as JSON; - is standard output")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. batch_size=8192 mesh.fsdp=16")
    plan.set_defaults(verb=_plan)

    methods = verbs.add_parser("methods", help="list methods, variants and papers")
    methods.add_argument("--configs", help="folder of config files; the project's own by default")
    methods.add_argument("--markdown", action="store_true", help="as a Markdown table")
    methods.set_defaults(verb=_methods)

    data = verbs.add_parser("data", help="look at a source, time it, or pack it into ArrayRecord shards")
    data_verbs = data.add_subparsers(required=True, metavar="verb")
    inspect = data_verbs.add_parser("inspect", help="count, keys, shapes, classes and a contact sheet")
    inspect.add_argument(
        "source", help="e.g. folder:/my/images, tar:shards-{000..009}.tar, npz:file.npz, tfds:cifar10/train"
    )
    inspect.add_argument("--out", default="contact_sheet.png")
    inspect.set_defaults(verb=_inspect)
    bench = data_verbs.add_parser("bench", help="images per second of each stage, and which one limits")
    bench.add_argument("source")
    bench.add_argument("--recipe", default="simclr", help="simclr, moco_v2, byol, multi_crop, mae or clip")
    bench.add_argument("--size", type=int, default=224, help="side of the views in pixels")
    bench.add_argument("--cores", type=int, help="threads, or workers, of the loader; all cores by default")
    bench.add_argument("--seconds", type=float, default=3.0, help="for each stage")
    bench.set_defaults(verb=_bench)
    pack = data_verbs.add_parser("pack", help="write a source as ArrayRecord shards")
    pack.add_argument("source")
    pack.add_argument("folder")
    pack.set_defaults(verb=_pack)
    return parser


def _train(options: argparse.Namespace) -> None:
    if options.seeds < 1:
        raise ValueError(f"--seeds is the number of seeds to train, at least 1; got {options.seeds}")
    from ssljax.distributed import initialize

    launch = initialize(options.coordinator, options.processes, options.process)
    print(f"launch: {launch}", flush=True)

    import jax
    from etils import epath
    from rich import print as show

    from ssljax.compilation import compilation_cache
    from ssljax.config import experiment, load_config, types_of
    from ssljax.goodput import Clock, Session, process_age
    from ssljax.summary import table
    from ssljax.train import train

    profile = _steps(options.profile) if options.profile else None
    workdir = epath.Path(options.workdir)
    workdirs = [workdir / f"seed_{i}" for i in range(options.seeds)] if options.seeds > 1 else [workdir]
    for i, folder in enumerate(workdirs):
        config = load_config(options.config, options.overrides)
        if options.seeds > 1:
            config.seed = int(config.to_dict().get("seed", 0)) + i
        e = experiment(config)
        clock = Clock(0.0 if i else process_age())
        with compilation_cache(workdir / "compilation_cache"), Session(folder, clock) as session:
            train(e, folder, wandb=options.wandb, profile=profile, session=session)
            if not options.no_report and jax.process_count() == 1:
                from ssljax.report import write_report

                with session.clock.phase("report"):
                    print(f"report: {write_report(folder, types=types_of(e))}")
    if jax.process_index() == 0 and (result := table(workdirs)).row_count:
        show(result)


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ValueError(f"--profile {text!r} should be FIRST:LAST, for example 10:15")
    return int(first), int(last)


def _eval(options: argparse.Namespace) -> None:
    import jax
    from rich.console import Console
    from rich.table import Table

    from ssljax.api import load
    from ssljax.config import experiment, load_config

    run = load(options.workdir, options.step, with_evals=options.config is None)
    evals = experiment(load_config(options.config, options.overrides)).evals if options.config else run.experiment.evals
    if not evals:
        raise ValueError("this config has no evals; give --config with some")
    result = Table(title=f"{options.workdir}, step {run.step}", caption="shares in %")
    for column in ("evaluation", "trained", "random"):
        result.add_column(column, justify="left" if column == "evaluation" else "right")
    initial = run.random_encoder()
    with jax.set_mesh(run.encoder.encoder.mesh):
        for name, evaluation in evals.items():
            trained, random = evaluation.run(run.encoder), evaluation.run(initial)
            for metric in trained:
                result.add_row(f"{name}/{metric}", f"{100 * trained[metric]:.1f}", f"{100 * random[metric]:.1f}")
    Console().print(result)


def _embed(options: argparse.Namespace) -> None:
    from ssljax.api import load, write_features

    found = load(options.workdir, options.step).embed(options.source, tuple(options.features.split(",")))
    write_features(options.out, found)
    shapes = ", ".join(f"{name} {values.shape}" for name, values in found.items())
    print(f"{options.out}: {shapes}")


def _check(options: argparse.Namespace) -> None:
    from rich.console import Console

    from ssljax.check import check
    from ssljax.checkpoint import CheckpointError

    table, damaged = check(options.workdir, options.arrays)
    Console().print(table)
    if damaged:
        raise CheckpointError(f"{damaged} of these are damaged; a run continues from its newest good checkpoint")


def _report(options: argparse.Namespace) -> None:
    from ssljax.report import write_report

    print(f"report: {write_report(options.workdir, options.source)}")


def _plan(options: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from ssljax import failures
    from ssljax.chips import Topology
    from ssljax.plan import make_plan, ranked, sweep
    from ssljax.plan_tables import ranking, show

    console = Console(stderr=options.json == "-", highlight=False)
    if not options.failures and (options.assume or options.save_every is not None):
        raise ValueError("--save-every and --assume belong to --failures")
    if options.save_every is not None and options.save_every < 1:
        raise ValueError(f"--save-every {options.save_every} is a number of steps, at least 1")
    assumptions = failures.Assumptions.parse(options.assume)
    topology, question = Topology.parse(options.topology), (options.config, options.overrides)
    if options.sweep:
        plans = []
        for plan in sweep(*question, topology):
            plans.append(plan)
            console.print(ranking([plan]))
        console.print(ranking(ranked(plans)))
    else:
        plans = [make_plan(*question, topology)]
        console.print(show(plans[0]))
    best, *others = ranked(plans)
    found = [best.as_dict(), *(plan.as_dict() for plan in others)]
    if options.failures:
        replayed = failures.forecast(best, assumptions, options.save_every)
        console.print(failures.show(replayed, options.save_every))
        found[0]["failures"] = replayed.as_dict()
    if options.json:
        text = json.dumps(found if options.sweep else found[0], indent=1)
        if options.json == "-":
            print(text)
        else:
            Path(options.json).write_text(text + "\n")


def _methods(options: argparse.Namespace) -> None:
    from rich.console import Console

    from ssljax.listing import methods_markdown, methods_table

    if options.markdown:
        print(methods_markdown(options.configs))
    else:
        Console().print(methods_table(options.configs))


def _inspect(options: argparse.Namespace) -> None:
    from ssljax.data import inspect, parse_source, print_summary

    print_summary(inspect(parse_source(options.source), options.out))
    print(f"contact sheet: {options.out}")


def _bench(options: argparse.Namespace) -> None:
    from rich.console import Console

    from ssljax.data import parse_source
    from ssljax.speed import measure, show

    source = parse_source(options.source)
    speed = measure(source, options.recipe, options.size, cores=options.cores, seconds=options.seconds)
    Console().print(show(speed, options.source))


def _pack(options: argparse.Namespace) -> None:
    from ssljax.data import pack, parse_source

    pack(parse_source(options.source), options.folder)


if __name__ == "__main__":
    run()
