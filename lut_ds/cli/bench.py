"""Sub-commands that measure."""

import argparse

from lut_ds.cli.parser import DONE, Answer, Commands, add_recipe, positive


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


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    group = commands.group("bench", "measure speed, memory and cost")
    sub = group.add(loader)
    add_recipe(sub)
    sub.add_argument("--batch", type=positive, help="images a batch")
    sub.add_argument("--workers", type=positive, help="threads of ours, processes of the others")
    sub.add_argument("--batches", type=positive, help="batches a round")
    sub.add_argument("--rounds", type=positive, help="rounds; every loader runs once in each")
    sub.add_argument("--step-ms", type=float, default=0.0, help="time a training step takes: measures the stall")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub.add_argument("--only", metavar="NAMES", help="ours,torchvision,webdataset: a selection")
    sub.add_argument("--tune", action="store_true", help="find and keep the fastest settings of ours for this machine")
