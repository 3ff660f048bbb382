"""Sub-commands that look at, check and repack data: `lut-ds data ...`."""

import argparse
import os
import re
from pathlib import Path

from lut_ds.cli.parser import BAD_INPUT, DONE, STOPPED, Answer, Commands, Parser, add_recipe, positive
from lut_ds.errors import UserError


def verify(args: argparse.Namespace) -> Answer:
    """Decode every sample as training would; write a clean index and name what cannot be used."""
    from lut_ds.data.verify import describe, verify
    from lut_ds.engine.signals import listen

    out = args.out or Path(f"{Path(args.path).resolve().name}.verified")
    with listen() as stop:
        summary = verify(
            args.path,
            out,
            workers=args.workers,
            min_side=args.min_side,
            drop_duplicates=args.drop_duplicates,
            stopped=lambda: stop.requested,
        )
    code = DONE if summary["complete"] else STOPPED
    if code == DONE and args.strict and summary["quarantined"]:
        code = BAD_INPUT
    return summary, describe(summary), code


def pack(args: argparse.Namespace) -> Answer:
    """Write an image folder, or any other source, as shuffled tar shards."""
    from lut_ds.data.pack import Options, describe, pack
    from lut_ds.engine.signals import listen

    options = Options(args.seed, args.shard_size, args.samples_per_shard, args.shorter_side, args.quality)
    with listen() as stop:
        result = pack(
            args.path, args.out, options, split=args.split, workers=args.workers, stopped=lambda: stop.requested
        )
    return result, describe(result), DONE if result["complete"] else STOPPED


def index(args: argparse.Namespace) -> Answer:
    """Write the index of tar shards, of an image folder or of a list, or check it."""
    from lut_ds.data.indexing import check, export_idx, index

    if args.output is not None and (args.check or args.wds2idx):
        raise UserError(
            "argument -o/--output: expected without --check and --wds2idx, which write no index; leave it out"
        )
    if args.check:
        problems, text = check(args.path, args.split, args.workers)
        return {"path": args.path, "problems": problems}, text, BAD_INPUT if problems else DONE
    if args.wds2idx:
        return *export_idx(args.path, args.split), DONE
    return *index(args.path, args.output, args.split, args.workers), DONE


def stats(args: argparse.Namespace) -> Answer:
    """Classes, sizes, formats, bytes, and what decoding will cost."""
    from lut_ds.data.outputs import writable_folder
    from lut_ds.data.stats import describe, survey

    if args.out is not None:
        writable_folder(args.out)
    statistics, raw = survey(args.path, args.sample, args.workers)
    text = describe(statistics)
    if args.out is not None:
        from lut_ds.analysis.data_stats import write_histograms

        written = [
            path for split, (found, counts) in raw.items() for path in write_histograms(args.out, split, found, counts)
        ]
        statistics["histograms"] = [str(path) for path in written]
        text += "\n" + "\n".join(f"wrote {path}" for path in written)
    return statistics, text, DONE


def show(args: argparse.Namespace) -> Answer:
    """Draw what the model will see: views, their masks, and what is to be predicted."""
    from lut_ds.analysis.contact_sheet import show_views
    from lut_ds.config import load_recipe

    shown = show_views(load_recipe(args.recipe, args.override), args.count, args.output)
    return shown, f"wrote {shown['image']}: {len(shown['samples'])} samples", DONE


def shapes(args: argparse.Namespace) -> Answer:
    """Write a small data set with classes: drawn shapes that no linear function of the pixels tells."""
    from lut_ds.data.shapes import CLASSES, write_shapes

    path = write_shapes(args.out, args.train, args.val, args.size, args.seed)
    result = {"path": str(path), "train": args.train, "val": args.val, "classes": CLASSES}
    return result, f"{path}: {args.train} training and {args.val} validation images of {len(CLASSES)} classes", DONE


def arrange(args: argparse.Namespace) -> Answer:
    """Arrange a published classification set, as it was downloaded, as train/<class>/ and val/<class>/."""
    from lut_ds.data.arrange.arrange import arrange, describe
    from lut_ds.engine.signals import listen

    with listen() as stop:
        result = arrange(args.name, args.source, args.dest, args.how, args.subset, lambda: stop.requested)
    return result, describe(result), DONE if result["complete"] else STOPPED


def scenes(args: argparse.Namespace) -> Answer:
    """Write a small data set for segmentation: drawn shapes on textured grounds, in ADE20K's folders."""
    from lut_ds.data.scenes import CLASSES, write_scenes

    path = write_scenes(args.out, args.train, args.val, args.size, args.seed)
    result = {"path": str(path), "train": args.train, "val": args.val, "classes": list(CLASSES)}
    return result, f"{path}: {args.train} training and {args.val} validation scenes of {len(CLASSES)} classes", DONE


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    group = commands.group("data", "check, index, pack and look at training data")
    sub = group.add(verify)
    sub.add_argument("path", type=_path, help="what data.path would be: an image folder, shards, an index or a list")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: NAME.verified)")
    _add_workers(sub)
    sub.add_argument("--min-side", type=positive, default=1, metavar="PIXELS", help="quarantine images below it")
    sub.add_argument("--drop-duplicates", action="store_true", help="quarantine all but one of byte-identical files")
    sub.add_argument("--strict", action="store_true", help="exit code 2 when anything is quarantined")
    _add_pack(group)
    sub = group.add(index)
    sub.add_argument("path", type=_path, help="shards, an image folder, or a list of files")
    sub.add_argument("-o", "--output", type=Path, metavar="FILE", help="index file (default: index.lut in the folder)")
    what = sub.add_mutually_exclusive_group()
    what.add_argument(
        "--check", action="store_true", help="compare the index with the data; exit code 2 if they differ"
    )
    what.add_argument("--wds2idx", action="store_true", help="write an .idx file beside each shard, as wds2idx does")
    _add_split(sub)
    _add_workers(sub)
    sub = group.add(stats)
    sub.add_argument("path", type=_path, help="what data.path would be")
    sub.add_argument("--sample", type=positive, metavar="N", help="measure so many of each split, drawn at random")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder for histograms as PNG")
    _add_workers(sub)
    _add_arrange(group)
    _add_scenes(group)
    _add_shapes(group)
    sub = group.add(show)
    add_recipe(sub)
    sub.add_argument("-n", "--count", type=positive, default=16, help="samples (default: 16)")
    sub.add_argument("-o", "--output", type=Path, default=Path("sheet.png"), metavar="PNG", help="default: sheet.png")


def _add_arrange(group: Commands) -> None:
    from lut_ds.data.arrange.layouts import SETS

    sub = group.add(arrange)
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    lines = [
        f"  {name:16} {s.classes:,} classes, {s.train:,} + {s.val:,} images: {s.layout}" for name, s in SETS.items()
    ]
    sub.epilog = "\n".join(
        ["What SOURCE holds:", *lines, "Interrupted, the same command goes on. Nothing is overwritten."]
    )
    sub.add_argument("name", choices=sorted(SETS), metavar="NAME", help=", ".join(SETS))
    sub.add_argument("source", type=Path, help="folder that the archives were unpacked to")
    sub.add_argument("dest", type=Path, help="folder to write")
    sub.add_argument(
        "--how",
        choices=("symlink", "hardlink", "copy"),
        default="symlink",
        help="what images become (default: symlink)",
    )
    sub.add_argument("--subset", action="store_true", help="part of the set: other numbers than the published are fine")


def _add_scenes(group: Commands) -> None:
    sub = group.add(scenes)
    sub.add_argument("out", type=Path, help="folder to write")
    sub.add_argument("--train", type=positive, default=240, metavar="N", help="training scenes (default: 240)")
    sub.add_argument("--val", type=positive, default=60, metavar="N", help="validation scenes (default: 60)")
    sub.add_argument("--size", type=positive, default=64, metavar="PIXELS", help="shortest side (default: 64)")
    sub.add_argument("--seed", type=_seed, default=0, help="default: 0")


def _add_shapes(group: Commands) -> None:
    sub = group.add(shapes)
    sub.add_argument("out", type=Path, help="folder to write")
    sub.add_argument("--train", type=positive, default=4000, metavar="N", help="training images (default: 4000)")
    sub.add_argument("--val", type=positive, default=1000, metavar="N", help="validation images (default: 1000)")
    sub.add_argument("--size", type=positive, default=32, metavar="PIXELS", help="side (default: 32)")
    sub.add_argument("--seed", type=_seed, default=0, help="default: 0")


def _add_pack(group: Commands) -> None:
    sub = group.add(pack)
    sub.add_argument("path", type=_path, help="what data.path would be: an image folder, shards, an index or a list")
    sub.add_argument("out", type=Path, help="folder for the shards")
    size = sub.add_mutually_exclusive_group()
    size.add_argument("--shard-size", type=_bytes, default=10**9, metavar="BYTES", help="about, such as 1GB (default)")
    size.add_argument("--samples-per-shard", type=positive, metavar="N")
    sub.add_argument("--seed", type=int, default=0, help="of the shuffle (default: 0)")
    sub.add_argument("--shorter-side", type=positive, metavar="PIXELS", help="make larger images smaller")
    sub.add_argument("--quality", type=_quality, metavar="1-100", help="of the JPEGs that are written (95)")
    _add_split(sub)
    _add_workers(sub)


def _add_split(sub: Parser) -> None:
    sub.add_argument("--split", choices=("train", "val"), default="train", help="of a folder that has both")


def _path(text: str) -> str:
    """A path; an empty one, as of a shell variable that is not set, would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, shards, an index or a list, found an empty path")
    return text


def _bytes(text: str) -> int:
    """A number of bytes: 500000, 300MB, 1GB, 1GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kMGT])(i?))?B?", text)
    size = float(match[1]) * (1024 if match[3] else 1000) ** (" kMGT".index(match[2] or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected bytes, such as 500000, 300MB or 1GiB, found {text!r}")
    return int(size)


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 100, found {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, found {text!r}")
    return int(text)


def _add_workers(sub: Parser) -> None:
    cores = len(os.sched_getaffinity(0))
    sub.add_argument("--workers", type=positive, default=cores, help="processes (default: every core)")
