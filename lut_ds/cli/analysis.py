"""Sub-commands that look into models and runs."""

import argparse

from lut_ds.cli.evaluation import add_model, request
from lut_ds.cli.parser import DONE, Answer, Commands, positive


def analyze(args: argparse.Namespace) -> Answer:
    """Look into a frozen model, or two beside each other: attention, relevance, spectra, similarity of layers.

    Writes a JSON and a PNG for each analysis into the output folder (default: evaluations/analysis in the run).
    """
    from lut_ds.transfer.analyze import DRAWINGS, analyze, describe

    only = list(DRAWINGS) if args.only is None else [word for word in args.only.split(",") if word]
    results = analyze(request(args, "mean"), args.other, only, args.images, args.train_images)
    return results, describe(results), DONE


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    sub = commands.add(analyze)
    add_model(sub)
    sub.add_argument("other", nargs="?", metavar="source2", help="a second model, shown in the same figures")
    names = "attention-distance,maps,relevance,spectrum,cka,layers"
    sub.add_argument("--only", metavar="NAMES", help=f"some of {names} (default: all)")
    sub.add_argument("--images", type=positive, default=256, metavar="N", help="validation images (default 256)")
    sub.add_argument(
        "--train-images", type=positive, default=4000, metavar="N", help="training images of `layers` (default 4000)"
    )
