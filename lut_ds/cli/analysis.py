"""Sub-commands that look into models and runs."""

import argparse

from lut_ds.cli.evaluation import add_model, request
from lut_ds.cli.parser import DONE, Answer, Commands, positive


def analyze(args: argparse.Namespace) -> Answer:
    """Look into a frozen model, or two beside each other: attention, relevance, spectra, similarity of layers.

    Writes a JSON and a PNG for each analysis into the output folder (default: evaluations/analysis in the run; of two runs
    evaluations/analysis_with_OTHER in both).
    """
    from lut_ds.transfer.analyze import DRAWINGS, analyze, describe

    only = list(DRAWINGS) if args.only is None else [word for word in args.only.split(",") if word]
    results = analyze(request(args, "mean"), args.other, only, args.images, args.train_images)
    return results, describe(results), DONE


def report(args: argparse.Namespace) -> Answer:
    """Write one HTML page about a run, or several beside each other: curves, evaluations, pictures, recipe, history.

    It needs nothing but itself. What knn, probe and analyze left in the run is shown; runs that go on, were stopped or
    killed are shown as far as they came.
    """
    from lut_ds.report import describe, report

    result = report(args.runs, args.output, args.analyze)
    return result, describe(result), DONE


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
    sub = commands.add(report)
    sub.add_argument("runs", nargs="+", metavar="RUN", help="run folder, of pre-training or fine-tuning")
    sub.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="default: run-report.html in the run, lut-ds-report.html here for several",
    )
    sub.add_argument("--analyze", action="store_true", help="run `lut-ds analyze` on each run first")
