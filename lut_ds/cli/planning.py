"""Sub-commands that predict a run."""

import argparse
import contextlib
import os
from pathlib import Path

from lut_ds.cli.parser import DONE, Answer, Commands, add_recipe, positive
from lut_ds.errors import UserError

GPUS = ("a100-40", "a100-80", "h100", "h200")


def plan(args: argparse.Namespace) -> Answer:
    """Predict memory, traffic, time and cost of a recipe on GPUs that need not be here.

    Stage, micro-batch and activation checkpointing are chosen, unless they are set on this command line
    (train.deepspeed=, train.micro_batch=, train.activation_checkpointing=). Every assumption is printed. Exits 2, and says
    what would fit, where nothing does.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # nothing is put on a device, and the machine that plans may have none
    from lut_ds.analysis.figures import png, write_aside
    from lut_ds.analysis.scaling import draw_scaling
    from lut_ds.bench.planner.plan import IMAGENET, Request, plan_run
    from lut_ds.bench.planner.words import describe
    from lut_ds.config import load_recipe

    if args.plot is not None and not (args.plot.endswith(".png") and Path(args.plot).absolute().parent.is_dir()):
        raise UserError(f"--plot: expected a file name that ends in .png, in a folder that exists, found {args.plot}")
    recipe = load_recipe(args.recipe, args.override)
    fixed = frozenset(word.partition("=")[0].strip() for word in args.override)
    images = args.images or IMAGENET
    request = Request(args.gpus, args.gpu, args.net, args.nodes_of, images, args.measured, fixed)
    planned = plan_run(recipe, args.recipe, request)
    text = describe(planned)
    if args.plot is not None:
        picture = png(lambda theme: draw_scaling(planned, theme))
        try:
            planned["plot"] = str(write_aside(Path(args.plot), picture))
        except OSError as error:
            raise UserError(f"--plot {args.plot}: cannot be written: {error.strerror}") from error
        text += f"\nplot written to {args.plot}"
    return planned, text, DONE


def _rate(text: str) -> float:
    """Gbit/s, for argparse."""
    with contextlib.suppress(ValueError):
        if 1e-3 <= float(text) < 1e5:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected Gbit/s from 0.001, found {text!r}")


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    sub = commands.add(plan)
    add_recipe(sub)
    sub.add_argument("--gpus", type=positive, required=True, metavar="N", help="in all")
    sub.add_argument("--gpu", choices=GPUS, required=True, help="which")
    sub.add_argument(
        "--net",
        type=_rate,
        metavar="GBPS",
        help="Gbit/s each way of a GPU's share of the network (default: 200 A100, 400 H)",
    )
    sub.add_argument("--nodes-of", type=positive, default=8, metavar="N", help="GPUs of a node (default 8)")
    sub.add_argument("--images", type=positive, metavar="N", help="of the training set (default: ImageNet's 1281167)")
    sub.add_argument("--measured", metavar="FILE", help="what `lut-ds bench step --json` printed on such a GPU")
    sub.add_argument("--plot", metavar="FILE.png", help="draw the scaling table")
