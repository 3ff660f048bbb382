"""Many runs of one recipe."""

import argparse
from pathlib import Path

from lut_ds.cli.parser import DONE, FAULT, STOPPED, Answer, Commands, add_overrides, positive


def sweep(args: argparse.Namespace) -> Answer:
    """Train and evaluate many runs of one recipe, side by side, and make one table of them.

    FILE names the recipe, what changes from run to run, and seeds (see lut_ds/engine/sweepfile.py). Interrupted, the same
    command continues; finished runs, also those of `lut-ds submit --sweep FILE`, are recognised. Runs of another recipe or
    of other images are refused, not mixed in.
    """
    from lut_ds.sweep.run import run_sweep

    path = Path(args.file)
    out = Path(args.out or Path("runs") / path.stem)
    results, text = run_sweep(path, out, args.override, args.jobs, not args.no_training)
    code = STOPPED if results["stopped_by"] else FAULT if results["failed"] else STOPPED if results["stopped"] else DONE
    return results, text, code


def add(commands: Commands) -> None:
    """Add this group's sub-command."""
    sub = commands.add(sweep)
    sub.add_argument("file", metavar="FILE", help="a YAML file: recipe, runs or grid, seeds, evaluations")
    sub.add_argument("--out", metavar="DIR", help="folder for runs and results (default: runs/NAME of the file)")
    sub.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default 1)")
    sub.add_argument(
        "--no-training",
        action="store_true",
        help="evaluate what is trained, by a job array perhaps, and make the table",
    )
    add_overrides(sub, "all runs")
