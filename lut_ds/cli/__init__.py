"""The `lut-ds` command: each sub-command reads its arguments and calls one function.

Standard output carries results only; with `--json` it is exactly one JSON object. Progress, logs and whatever libraries
print go to standard error. Exit codes: 0 done, 1 fault while running, 2 bad input, 3 stopped by a signal with a
checkpoint saved. A file here holds one group of sub-commands; `parser.py` what they share.
"""

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from lut_ds.cli import analysis, bench, data, evaluation, planning, robustness, segmentation, sweep, training
from lut_ds.cli.parser import BAD_INPUT, FAULT, Parser, add_commands
from lut_ds.errors import RunFault, UserError

GROUPS = (training, sweep, data, bench, evaluation, segmentation, planning, analysis, robustness)
INTERRUPTED = 130


def build_parser() -> Parser:
    """All sub-commands and their arguments."""
    parser = Parser(prog="lut-ds", description="Masked-image pre-training of Vision Transformers with LUT and MAE.")
    # The deepspeed launcher puts this in front of the program's own arguments.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = add_commands(parser)
    for group in GROUPS:
        group.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    # Read when torch loads: threads that wait must not keep a core that decoding, or another process, could use.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    code, reason = _run(argv, rank)
    # For launch/job.sh. Launchers hide it: torchrun ends with 1 whatever its ranks say, srun with the signal of a rank it ended.
    note = os.environ.get("LUT_DS_EXIT_FILE")
    if note and (rank == "0" or code == BAD_INPUT):
        with contextlib.suppress(OSError):  # a full disk; without the note the launcher's code stands
            Path(note).write_text(f"{code} {reason}\n")
    return code


def _run(argv: Sequence[str] | None, rank: str) -> tuple[int, str]:
    """Run a command; returns the exit code, and what stopped it early if something did."""
    try:
        args = build_parser().parse(argv)
        results = _reserve_standard_output()
        if args.local_rank is not None:
            os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
        result, text, code = args.function(args)
        if rank == "0":
            _show(json.dumps(result) if args.json else text, results)
        return int(code), str(result.get("stopped_by") or "")
    except UserError as error:
        if rank == "0" or error.this_rank:
            print(f"lut-ds: {error}", file=sys.stderr)
        return BAD_INPUT, ""
    except RunFault as error:
        print(f"lut-ds: {error}", file=sys.stderr)
        return FAULT, ""
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"lut-ds: disk full: {error}; the last good checkpoint is intact, free space and run again", file=sys.stderr
        )
        return FAULT, ""
    except KeyboardInterrupt:
        print("lut-ds: interrupted", file=sys.stderr)
        return INTERRUPTED, ""


def _show(text: str, results: TextIO) -> None:
    """Print a result; a reader that has seen enough, such as `head`, is no fault."""
    try:
        print(text, file=results, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), results.fileno())  # what is left is written when the process ends


def _reserve_standard_output() -> TextIO:
    """Keep standard output for results: whatever else this process writes to it goes to standard error."""
    sys.stdout.flush()
    kept = os.fdopen(os.dup(1), "w", errors="surrogateescape")  # names of files may be any bytes
    os.dup2(2, 1)
    return kept
