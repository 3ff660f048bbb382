"""The `lut-ds` command: each sub-command reads its arguments and calls one function.

Standard output carries results only; with `--json` it is exactly one JSON object. Progress, logs and whatever libraries
print go to standard error. Exit codes: 0 done, 1 fault while running, 2 bad input, 3 stopped by a signal with a
checkpoint saved.
"""

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from lut_ds.errors import RunFault, UserError

DONE, FAULT, BAD_INPUT, STOPPED = 0, 1, 2, 3


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Arguments, with `section.key=value` anywhere after the recipe: argparse takes them only in one place."""
        args, rest = self.parse_known_args(argv)
        unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "override")]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        if rest:
            args.override = [*args.override, *rest]
        return args


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def pretrain(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    """Train, continue or plan a run."""
    from lut_ds.config import load_recipe

    recipe = load_recipe(args.recipe, args.override)
    if args.dry_run:
        os.environ["DS_ACCELERATOR"] = "cpu"  # nothing is put on a device, and the machine that plans may have none
        from lut_ds.engine.plan import describe_plan, plan

        planned = plan(recipe, args.world_size or int(os.environ.get("WORLD_SIZE", "1")))
        return planned, describe_plan(args.recipe, planned), DONE
    from lut_ds.engine.train import pretrain

    outcome = pretrain(recipe, args.recipe)
    ended = f"stopped by {outcome.stopped_by} at" if outcome.stopped_by else "done:"
    text = f"{ended} step {outcome.step} of {outcome.steps}; {outcome.folder}"
    return outcome.as_dict(), text, STOPPED if outcome.stopped_by else DONE


def demo(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    """Pre-train a small LUT on handwritten digits and report what it learned."""
    from lut_ds.demo import run_demo

    results, text = run_demo(args.override)
    return results, text, STOPPED if results.get("stopped_by") else DONE


def export(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    """Write the encoder as a timm checkpoint."""
    from lut_ds.transfer.export import export_timm

    result = export_timm(args.source, "ema" if args.ema else "student", args.output)
    return result, f"wrote {result['weights']} ({result['kind']} of step {result['step']})", DONE


def doctor(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    """What works on this machine, and what to do about what does not."""
    from lut_ds.doctor import describe_report, examine

    report = examine()
    return report, describe_report(report), DONE


def recipes(args: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    """The shipped recipes and the first line of each."""
    from lut_ds.config import recipe_folder, shipped_recipes

    heads = {
        name: (recipe_folder() / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ") for name in shipped_recipes()
    }
    return heads, "\n".join(f"{name:14} {head}" for name, head in heads.items()), DONE


def build_parser() -> Parser:
    """All sub-commands and their arguments."""
    parser = Parser(prog="lut-ds", description="Masked-image pre-training of Vision Transformers with LUT and MAE.")
    # The deepspeed launcher puts this in front of the program's own arguments.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(function: Callable[..., Any]) -> argparse.ArgumentParser:
        doc = (function.__doc__ or "").strip()
        sub = commands.add_parser(function.__name__, help=doc.splitlines()[0], description=doc)
        sub.set_defaults(function=function)
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        return sub

    sub = command(pretrain)
    sub.add_argument("recipe", help="name of a shipped recipe, or a .yaml file")
    sub.add_argument(
        "override", nargs="*", default=[], metavar="section.key=value", help="change a value of the recipe"
    )
    sub.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    sub.add_argument("--world-size", type=positive, help="ranks to plan for (with --dry-run)")
    command(demo).add_argument(
        "override", nargs="*", default=[], metavar="section.key=value", help="change a value of the demo recipe"
    )
    sub = command(export)
    sub.add_argument("source", help="run folder or checkpoint folder")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--ema", action="store_true", default=True, help="the EMA teacher's weights (default)")
    which.add_argument("--student", dest="ema", action="store_false", help="the student's weights")
    sub.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
    command(doctor)
    command(recipes)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    # Read when torch loads: threads that wait must not keep a core that decoding, or another process, could use.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    try:
        args = build_parser().parse(argv)
        results = _reserve_standard_output()
        if args.local_rank is not None:
            os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
        result, text, code = args.function(args)
        if rank == "0":
            print(json.dumps(result) if args.json else text, file=results, flush=True)
        return code
    except UserError as error:
        if rank == "0" or error.this_rank:
            print(f"lut-ds: {error}", file=sys.stderr)
        return BAD_INPUT
    except RunFault as error:
        print(f"lut-ds: {error}", file=sys.stderr)
        return FAULT
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"lut-ds: disk full: {error}; the last good checkpoint is intact, free space and run again", file=sys.stderr
        )
        return FAULT
    except KeyboardInterrupt:
        print("lut-ds: interrupted", file=sys.stderr)
        return 130


def _reserve_standard_output() -> TextIO:
    """Keep standard output for results: whatever else this process writes to it goes to standard error."""
    sys.stdout.flush()
    kept = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return kept
