"""Semantic segmentation."""

import argparse

from lut_ds.cli.evaluation import SOURCES, model_source
from lut_ds.cli.parser import DONE, STOPPED, Answer, Commands, add_overrides


def segment(args: argparse.Namespace) -> Answer:
    """Train UPerNet on a pre-trained encoder and report mIoU, or continue that.

    The data need ADE20K's folders: images/training, annotations/training, images/validation, annotations/validation
    (`lut-ds data scenes DIR` writes a small set). Without a recipe the one of the checkpoint's size is taken.
    """
    from lut_ds.transfer.segmentation.config import load_segment_recipe
    from lut_ds.transfer.segmentation.segment import segment
    from lut_ds.transfer.segmentation.start import recipe_for

    # Without a recipe, argparse takes the first override for one.
    words = args.override if args.recipe is None or "=" not in args.recipe else [args.recipe, *args.override]
    name = None if args.recipe is None or "=" in args.recipe else args.recipe
    source = model_source(args.source)
    own = [f"model.source={source}", *([f"model.weights={args.weights}"] if args.weights else [])]
    name = name or recipe_for(source, args.weights)
    result = segment(load_segment_recipe(name, [*words, *own]), name)
    if result["stopped_by"]:
        text = f"stopped by {result['stopped_by']} at step {result['step']} of {result['steps']}; {result['folder']}"
        return result, text, STOPPED
    best = result["best"]
    text = (
        f"mIoU {best['miou']:.2f} %, mAcc {best['macc']:.2f} %, aAcc {best['aacc']:.2f} % (step {best['step']}); "
        f"{result['weights']}"
    )
    return result, text, DONE


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    sub = commands.add(segment)
    sub.add_argument("source", help=SOURCES)
    sub.add_argument(
        "recipe", nargs="?", help="name of a shipped segmentation recipe (segment_vitb16, ...), or a .yaml file"
    )
    add_overrides(sub)
    sub.add_argument(
        "--weights", choices=("ema", "student"), help="whose weights (default: the average, if there is one)"
    )
