"""Sub-commands that look at, check and repack data: `lut-ds data ...`."""

import argparse
import os
from pathlib import Path

from lut_ds.cli.parser import BAD_INPUT, DONE, STOPPED, Answer, Commands, Parser, positive


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


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    group = commands.group("data", "check, index, pack and look at training data")
    sub = group.add(verify)
    sub.add_argument("path", help="what data.path would be: an image folder, shards, an index or a list")
    sub.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: NAME.verified)")
    _add_workers(sub)
    sub.add_argument("--min-side", type=positive, default=1, metavar="PIXELS", help="quarantine images below it")
    sub.add_argument("--drop-duplicates", action="store_true", help="quarantine all but one of byte-identical files")
    sub.add_argument("--strict", action="store_true", help="exit code 2 when anything is quarantined")


def _add_workers(sub: Parser) -> None:
    cores = len(os.sched_getaffinity(0))
    sub.add_argument("--workers", type=positive, default=cores, help="processes (default: every core)")
