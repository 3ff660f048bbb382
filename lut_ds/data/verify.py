"""`lut-ds data verify`: every sample decoded once, by every core, before a cluster finds out what is wrong with them.

Writes `clean/` (an index of the usable samples: a data.path), `quarantine.jsonl` (the others: name, reason, detail),
`findings.jsonl` (what is odd but can be used, and oddities of the folders) and `summary.json`.
"""

import os
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lut_ds.data import journal as journals
from lut_ds.data.journal import Journal
from lut_ds.data.outputs import hold, write_lines
from lut_ds.data.parts import Part, fingerprint, open_parts, opener, refuse_inside
from lut_ds.data.progress import progress_bar
from lut_ds.data.records import Details, State
from lut_ds.data.sources import Source
from lut_ds.data.verdict import CLEAN, FINDINGS, OUTPUTS, QUARANTINE, SUMMARY, Verdict
from lut_ds.data.workers import Crash, Crew, Work
from lut_ds.errors import UserError

LOG = "decoder.log"
INSPECTION = "lut_ds.data.inspection"  # imports torch and DALI, which this process has no use for
_PATIENCE = 300.0  # seconds in which a worker that does not wait for storage must answer
_CHUNK = 32  # samples a task: small enough to lose little, large enough that handing out costs nothing


def verify(
    path: str,
    out: Path,
    *,
    workers: int,
    min_side: int = 1,
    drop_duplicates: bool = False,
    retry_seconds: float = 60.0,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Decode every sample of `path` (both splits of a folder that has train and val) and write the results into `out`.

    A sample is usable exactly if training would use it. Interrupted, it keeps a journal in `out`, and goes on from there
    when it runs again; a file that changed in between is not looked at again.

    Args:
        workers: processes.
        min_side: pixels; images whose shorter side is below it go to quarantine.
        drop_duplicates: all but the first of byte-identical files go to quarantine.
        retry_seconds: how long storage that is away is waited for; what it holds is not bad.
        stopped: asked now and then whether to stop.

    Returns:
        the summary, with `complete` False when it was stopped.

    Raises:
        UserError: nothing to verify, or `out` holds something else.
        RunFault: the storage stays away.
    """
    began = time.monotonic()
    _refuse_foreign(out)
    parts = open_parts(path)
    for part in parts:
        refuse_inside(out, part.folder, part.source)
    count = sum(len(part.source) for part in parts)
    with closing(Journal(out, _identity(path, parts, min_side), count)) as journal:
        found_before = count - len(journal.pending())
        with progress_bar("verify", count, found_before) as bar:
            for part in parts:
                listing = opener(path, part, out / journals.LISTINGS[part.split])
                inspector = partial(open_inspector, listing, min_side, retry_seconds, out / LOG)
                crew = Crew[Details](inspector, workers, preload=[INSPECTION], patience=_PATIENCE + retry_seconds)
                _examine(part, journal, crew, bar.update, stopped)
        left = len(journal.pending())
        summary = {"path": path, "out": str(out), "samples": count, "complete": not left, "resumed_at": found_before}
        if left:
            return {**summary, "examined": count - left}
        summary |= Verdict(path, parts, journal.records, journal.details(), drop_duplicates).write(out)
        summary["seconds"] = round(time.monotonic() - began, 3)
        write_lines(out / SUMMARY, [summary], indent=1)
        journal.remove()
        return summary


def open_inspector(open_source: Callable[[], Source], min_side: int, retry_seconds: float, log: Path) -> Work[Details]:
    """An Inspector in a worker process; what decoders write to standard error goes to `log`."""
    from lut_ds.data.inspection import Inspector

    terminal = os.dup(2)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 2)
    os.close(file)
    return Inspector(open_source(), min_side, retry_seconds, partial(_say, terminal))


def _say(terminal: int, text: str) -> None:
    """Show a line, for all workers: the first that has one to show holds the log, and so the word."""
    if hold(2):
        os.write(terminal, os.fsencode(f"\n{text}\n"))


def _refuse_foreign(out: Path) -> None:
    known = {*OUTPUTS, LOG, *journals.OWN}
    asides = tuple(f".{name}." for name in known)  # left by a process that was killed
    listed = os.listdir(out) if out.is_dir() else []
    foreign = sorted(name for name in listed if name not in known and not name.startswith(asides))
    if foreign or (out.exists() and not out.is_dir()):
        what = foreign[0] if foreign else "a file"
        raise UserError(
            f"{out}: expected a folder of an earlier verification or none, found {what}; give another --out"
        )


def _identity(path: str, parts: list[Part], min_side: int) -> dict[str, Any]:
    """What is examined and how."""
    names = {part.split: fingerprint(part.source) for part in parts}
    return {"path": os.path.abspath(path), "names": names, "min_side": min_side}


def _examine(
    part: Part, journal: Journal, crew: Crew[Details], advance: Callable[[int], Any], stopped: Callable[[], bool]
) -> None:
    pending = journal.pending()
    own = pending[(pending >= part.first) & (pending < part.samples.stop)] - part.first
    for samples, answer in crew.run((own[i : i + _CHUNK] for i in range(0, len(own), _CHUNK)), stopped):
        if isinstance(answer, Crash):
            records = np.zeros(1, journal.records.dtype)
            records["state"] = State.CRASHES_THE_DECODER
            answer = Details(records, {int(samples[0]): answer.why})
        journal.write(samples, answer, part.first)
        advance(len(samples))


def describe(summary: dict[str, Any]) -> str:
    """The summary for people."""
    if not summary["complete"]:
        return f"stopped after {summary['examined']:,} of {summary['samples']:,}; run it again to go on"
    lines = [
        f"{summary['samples']:,} samples, {summary['bytes'] / 1e9:.3f} GB: {summary['usable']:,} usable, "
        f"{summary['quarantined']:,} in {summary['out']}/{QUARANTINE}",
        *(f"  {count:>8,} {reason}" for reason, count in summary["reasons"].items()),
    ]
    if summary["findings"]:
        lines.append(f"usable, but see {summary['out']}/{FINDINGS}")
        lines += [f"  {count:>8,} {kind}" for kind, count in summary["findings"].items()]
    if any(split["clean_index"] for split in summary["splits"].values()):
        lines.append(f"clean index: data.path={summary['out']}/{CLEAN}")
    return "\n".join(lines)
