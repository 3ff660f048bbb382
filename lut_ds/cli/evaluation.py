"""Sub-commands that use a pre-trained encoder."""

import argparse
import os

from lut_ds.cli.parser import DONE, STOPPED, Answer, Commands, add_overrides, positive


def export(args: argparse.Namespace) -> Answer:
    """Write the encoder as a timm checkpoint."""
    from lut_ds.transfer.export import export_timm

    result = export_timm(args.source, "ema" if args.ema else "student", args.output, args.heads)
    if result["step"] is not None:
        return result, f"wrote {result['weights']} ({result['kind']} of step {result['step']})", DONE
    left = ", ".join(f"{part} ({count} tensors)" for part, count in result["left_out"].items()) or "nothing"
    return result, f"wrote {result['weights']} ({result['kind']} of {args.source}); left out: {left}", DONE


def finetune(args: argparse.Namespace) -> Answer:
    """Fine-tune a pre-trained encoder as a classifier, or continue that."""
    from lut_ds.transfer.config import load_finetune_recipe
    from lut_ds.transfer.finetune import finetune

    source = os.path.abspath(os.path.expanduser(args.source))
    recipe = load_finetune_recipe(args.recipe, [*args.override, f"model.source={source}"])
    result = finetune(recipe, args.recipe)
    if result["stopped_by"]:
        text = f"stopped by {result['stopped_by']} at step {result['step']} of {result['steps']}; {result['folder']}"
        return result, text, STOPPED
    best = result["best"]
    text = f"top-1 {best['top1']:.2f} %, top-5 {best['top5']:.2f} % (epoch {best['epoch']:g}); {result['weights']}"
    return result, text, DONE


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    sub = commands.add(export)
    sub.add_argument("source", help="run folder, checkpoint folder, or a .pth file of the published LUT or MAE code")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--ema", action="store_true", default=True, help="the EMA teacher's weights (default)")
    which.add_argument("--student", dest="ema", action="store_false", help="the student's weights")
    sub.add_argument("--heads", type=positive, help="attention heads of a .pth file whose size is not published")
    sub.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
    sub = commands.add(finetune)
    sub.add_argument("source", help="run folder, checkpoint folder, or a .pth file of the published LUT or MAE code")
    sub.add_argument("recipe", help="name of a shipped fine-tuning recipe (finetune_vitb16, ...), or a .yaml file")
    add_overrides(sub)
