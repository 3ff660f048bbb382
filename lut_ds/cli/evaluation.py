"""Sub-commands that use a pre-trained encoder."""

import argparse

from lut_ds.cli.parser import DONE, Answer, Commands


def export(args: argparse.Namespace) -> Answer:
    """Write the encoder as a timm checkpoint."""
    from lut_ds.transfer.export import export_timm

    result = export_timm(args.source, "ema" if args.ema else "student", args.output)
    return result, f"wrote {result['weights']} ({result['kind']} of step {result['step']})", DONE


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    sub = commands.add(export)
    sub.add_argument("source", help="run folder or checkpoint folder")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--ema", action="store_true", default=True, help="the EMA teacher's weights (default)")
    which.add_argument("--student", dest="ema", action="store_false", help="the student's weights")
    sub.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
