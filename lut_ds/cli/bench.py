"""Sub-commands that measure."""

import argparse

from lut_ds.cli.parser import DONE, Answer, Commands, add_overrides, add_recipe, positive
from lut_ds.errors import UserError


def loader(args: argparse.Namespace) -> Answer:
    """Measure the loader beside torchvision's (and webdataset's where installed) on the same files and views."""
    from lut_ds.bench.loader import Options, bench_loader, describe_loader_bench
    from lut_ds.config import load_recipe

    given = {"batch_size": args.batch, "workers": args.workers, "batches": args.batches, "rounds": args.rounds}
    chosen = {key: value for key, value in given.items() if value is not None}
    if args.only:
        chosen["only"] = tuple(args.only.split(","))
    recipe = load_recipe(args.recipe, args.override)
    options = Options(**chosen, step_ms=args.step_ms, device=args.device)
    if args.tune:
        from lut_ds.bench.loader_tune import describe_tuning, tune_loader

        tuned = tune_loader(recipe, options)
        return tuned, describe_tuning(tuned), DONE
    report = bench_loader(recipe, options)
    return report, describe_loader_bench(report), DONE


def step(args: argparse.Namespace) -> Answer:
    """Measure a training step: images/s, MFU, its parts and memory; beside it variants, a baseline, published code."""
    from lut_ds.bench.step import Options, bench_step, describe_step_bench, step_recipe

    # Without a recipe (--model), argparse takes the first override for one.
    words = args.override if args.recipe is None or "=" not in args.recipe else [args.recipe, *args.override]
    name = None if args.recipe is None or "=" in args.recipe else args.recipe
    given = {"steps": args.steps, "rounds": args.rounds, "threads": args.threads}
    peers = tuple((peer, folder) for peer in ("lut", "mae") if (folder := getattr(args, f"peer_{peer}")) is not None)
    options = Options(
        batch=args.batch,
        device=args.device,
        variants=args.variants,
        expert=args.peers,
        peers=peers,
        trace=args.trace,
        **{key: value for key, value in given.items() if value is not None},
    )
    precision = [f"precision.{key}={args.precision}" for key in ("compute", "teacher")] if args.precision else []
    recipe = step_recipe(name, args.model, [*precision, *words], args.batch)
    if args.memory is not None and not args.tune:
        raise UserError("bench step --memory: only --tune has a limit; add --tune, or leave --memory out")
    if args.tune and (args.peers or args.variants or args.trace or peers):
        raise UserError("bench step --tune: measures ours alone; leave out --peers, --peer-*, --variants and --trace")
    if args.tune:
        from lut_ds.bench.step_tune import describe_step_tuning, tune_step

        tuned = tune_step(recipe, options, args.memory)
        return tuned, describe_step_tuning(tuned), DONE
    report = bench_step(recipe, options)
    return report, describe_step_bench(report), DONE


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    group = commands.group("bench", "measure speed, memory and cost")
    add_step(group)
    sub = group.add(loader)
    add_recipe(sub)
    sub.add_argument("--batch", type=positive, help="images a batch")
    sub.add_argument("--workers", type=positive, help="threads of ours, processes of the others")
    sub.add_argument("--batches", type=positive, help="batches a round")
    sub.add_argument("--rounds", type=positive, help="rounds; every loader runs once in each")
    sub.add_argument(
        "--step-ms", type=_milliseconds, default=0.0, help="time a training step takes: measures the stall"
    )
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub.add_argument("--only", metavar="NAMES", help="ours,torchvision,webdataset: a selection")
    sub.add_argument("--tune", action="store_true", help="find and keep the fastest settings of ours for this machine")


def add_step(group: Commands) -> None:
    """`lut-ds bench step` and its arguments."""
    sub = group.add(step)
    sub.add_argument("recipe", nargs="?", help="name of a shipped recipe, or a .yaml file; or give --model")
    add_overrides(sub)
    sub.add_argument("--model", help="a timm name, e.g. vit_large_patch16_224: its LUT recipe")
    sub.add_argument("--batch", type=positive, default=16, help="images a step, over all ranks")
    sub.add_argument("--precision", choices=("fp32", "bf16"), help="of student and teacher")
    sub.add_argument("--steps", type=positive, help="steps a round")
    sub.add_argument("--rounds", type=positive, help="rounds; every side runs once in each")
    sub.add_argument("--threads", type=positive, help="torch threads on a CPU, for every side")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub.add_argument("--variants", action="store_true", help="also precision, compile, kernels, ZeRO stages and more")
    sub.add_argument(
        "--tune", action="store_true", help="find the fastest micro-batch, and settings to paste; ours alone"
    )
    sub.add_argument(
        "--memory", type=_gib, metavar="GIB", help="with --tune: what a trial may take, default all that is free"
    )
    sub.add_argument("--peers", action="store_true", help="also a plain-PyTorch baseline, and the --peer-* given")
    sub.add_argument("--peer-lut", metavar="DIR", help="checkout of the published LUT code")
    sub.add_argument("--peer-mae", metavar="DIR", help="checkout of the published MAE code")
    sub.add_argument(
        "--trace", metavar="FILE", help="write a profiler trace (JSON) of two steps; open in ui.perfetto.dev"
    )


def _gib(text: str) -> float:
    """A size above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected GiB above 0, found {text!r}")
    return value


def _milliseconds(text: str) -> float:
    """A time from 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 3.6e6:
        raise argparse.ArgumentTypeError(f"expected milliseconds from 0 to an hour, found {text!r}")
    return value
