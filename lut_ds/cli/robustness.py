"""The sub-command that tests a classifier on images unlike those that it was trained on."""

import argparse

from lut_ds.cli.evaluation import add_frozen, request
from lut_ds.cli.parser import DONE, Answer, Commands, positive
from lut_ds.errors import UserError


def robustness(args: argparse.Namespace) -> Answer:
    """Accuracy on ImageNet-A, -R, -Sketch, -V2, ObjectNet, corrupted images, and images with hidden or shuffled patches.

    SOURCE is a classifier (a folder of finetune, an export or timm's file with a head); any other encoder gets a linear
    probe on its frozen features. Sets are looked for in DIR under the names of their downloads. clean, c, occlusion and
    shuffle take DIR/val; c is computed where DIR/imagenet-c is absent. The same command continues after a stop.
    """
    from lut_ds.transfer.robustness.plan import Wanted
    from lut_ds.transfer.robustness.run import evaluate_robustness
    from lut_ds.transfer.robustness.tables import summary

    sets, folders = _sets(args.sets)
    names = ("corruptions", "severities", "ratios", "grids", "limit", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    results = evaluate_robustness(request(args, "mean"), Wanted(sets, folders, **given))
    head = f"{results['model']['source']}, classifier: {results['classifier']['head']}"
    return results, "\n".join([head, summary(results), f"written to {results['output']}"]), DONE


def _sets(text: str | None) -> tuple[tuple[str, ...] | None, dict[str, str]]:
    """`a,c=DIR` -> names, and the folders that were named."""
    if text is None:
        return None, {}
    words = [word.partition("=") for word in text.split(",")]
    return tuple(name for name, _, _ in words), {name: folder for name, mark, folder in words if mark}


def _whole(text: str) -> tuple[int, ...]:
    """`1,3,5`, for argparse."""
    return tuple(positive(word) for word in text.split(","))


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--ratios: expected numbers such as 0.25,0.5, found {text!r}") from None


def _names(text: str) -> tuple[str, ...]:
    from lut_ds.transfer.robustness.corruptions import CORRUPTIONS

    return tuple(CORRUPTIONS) if text == "all" else tuple(text.split(","))


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    sub = commands.add(robustness)
    add_frozen(sub)
    sub.add_argument(
        "--sets",
        metavar="S,S=DIR",
        help="of clean, c, occlusion, shuffle, a, r, sketch, v2, objectnet; S=DIR: not in the data folder (default: the "
        "first four, and the others that are there)",
    )
    sub.add_argument("--corruptions", type=_names, metavar="C,C", help="default: the 15 of mCE; all: 4 extra ones too")
    sub.add_argument("--severities", type=_whole, metavar="N,N", help="of 1 to 5 (default: all)")
    sub.add_argument(
        "--ratios", type=_shares, metavar="R,R", help="shares of hidden patches (default 0.25,0.5,0.75,0.9)"
    )
    sub.add_argument(
        "--grids", type=_whole, metavar="N,N", help="cells along a side that are shuffled (default 2,4,7,14)"
    )
    sub.add_argument("--limit", type=positive, metavar="N", help="images of each set, spread evenly (default: all)")
    sub.add_argument("--seed", type=int, default=0, help="of corruptions, hidden patches and orders (default 0)")
