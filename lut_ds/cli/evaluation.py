"""Sub-commands that use a pre-trained encoder."""

import argparse

from lut_ds.cli.parser import DONE, Answer, Commands, positive


def export(args: argparse.Namespace) -> Answer:
    """Write the encoder as a timm checkpoint."""
    from lut_ds.transfer.export import export_timm

    result = export_timm(args.source, "ema" if args.ema else "student", args.output, args.heads)
    if result["step"] is not None:
        return result, f"wrote {result['weights']} ({result['kind']} of step {result['step']})", DONE
    left = ", ".join(f"{part} ({count} tensors)" for part, count in result["left_out"].items()) or "nothing"
    return result, f"wrote {result['weights']} ({result['kind']} of {args.source}); left out: {left}", DONE


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    sub = commands.add(export)
    sub.add_argument("source", help="run folder, checkpoint folder, or a .pth file of the published LUT or MAE code")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--ema", action="store_true", default=True, help="the EMA teacher's weights (default)")
    which.add_argument("--student", dest="ema", action="store_false", help="the student's weights")
    sub.add_argument("--heads", type=positive, help="attention heads of a .pth file whose size is not published")
    sub.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
