"""`lut-ds sweep`: what is finished is recognised, the rest is run, and one table is made of what there is."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lut_ds.analysis.figures import png, write_aside
from lut_ds.analysis.sweep_figure import draw_sweep
from lut_ds.data.outputs import writable_folder
from lut_ds.durations import in_words
from lut_ds.engine.build import flops_shape
from lut_ds.engine.launch import rank_cores
from lut_ds.engine.runfolder import check_run_folder, environment
from lut_ds.engine.signals import StopRequest, listen
from lut_ds.engine.step import check_batch_norm, split_batch
from lut_ds.engine.sweepfile import Entry, SweepFile, read_sweep
from lut_ds.errors import UserError
from lut_ds.method.flops import step_flops
from lut_ds.sweep import table
from lut_ds.sweep.measure import KS, recorded
from lut_ds.sweep.pool import Ended, Job, run_jobs
from lut_ds.sweep.worker import STOPPED, work_pixels, work_run
from lut_ds.transfer.labelled import open_labelled

FILES = ("sweep.json", "table.md", "table.csv", "sweep.png")
_PIXELS = "raw_pixels.json"
_OVERHEAD = 2e11  # FLOPs that take about as long as the start and the evaluation of a run
_PANELS = ("knn", "probe", "attention_distance", "effective_rank")


def run_sweep(path: Path, out: Path, overrides: Sequence[str], side_by_side: int) -> tuple[dict[str, Any], str]:
    """Run, or continue, a sweep; see `sweepfile` for the file.

    Args:
        out: folder for runs, logs and results.
        overrides: `section.key=value`, over all that the file says.
        side_by_side: runs at a time.

    Returns:
        What sweep.json holds, and the table for people. `failed` names runs that failed, with the last line of their logs;
        `stopped_by` what ended the sweep early.

    Raises:
        UserError: a file, recipe or data that cannot work, found before anything is trained.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "sweep: expected one process, found WORLD_SIZE above 1; start it without a launcher, see --jobs"
        )
    began, sweep = time.monotonic(), read_sweep(path, out, overrides)
    images = _check(sweep)
    writable_folder(out / "logs")
    todo = [entry for entry in sweep.entries if recorded(entry, sweep.evaluate) is None]
    pixels = out / _PIXELS
    threads = max(1, rank_cores() // side_by_side)
    jobs = [_job(entry, sweep, images, threads, out) for entry in todo]
    if sweep.pixels and not pixels.is_file():
        log = out / "logs" / "raw_pixels.txt"
        jobs.insert(0, Job("raw pixels", _OVERHEAD, work_pixels, (sweep.entries[0].recipe, pixels, threads), log))
    _say(f"{len(sweep.entries)} runs, {len(sweep.entries) - len(todo)} of them finished before; {out}")
    with listen() as stop:
        failed = _run(jobs, side_by_side, threads, stop)
    results = _results(sweep, failed, stop, pixels, round(time.monotonic() - began, 1))
    return results, _write(results, out)


def _check(sweep: SweepFile) -> int:
    """Refuse what would fail later; returns the number of training images."""
    images: dict[str, int] = {}
    for entry in sweep.entries:
        recipe = entry.recipe
        try:
            if recipe.data.path is None:
                raise UserError(
                    "data.path: no image folder given; add data.path=DIR with train/<class>/ and val/<class>/"
                )
            if recipe.data.path not in images:
                train, _ = open_labelled(recipe.data.path)
                images[recipe.data.path] = len(train)
            if images[recipe.data.path] < max(max(KS), recipe.train.global_batch):
                need = max(max(KS), recipe.train.global_batch)
                raise UserError(
                    f"data.path: {recipe.data.path}: expected at least {need} training images, found {images[recipe.data.path]}"
                )
            micro_batch, _ = split_batch(recipe.train.global_batch, recipe.train.micro_batch, 1)
            check_batch_norm(recipe, micro_batch)
            check_run_folder(entry.folder, recipe)
        except UserError as error:
            raise UserError(f"sweep {sweep.path}: runs.{entry.name}: {error}") from None
    return max(images.values())


def _job(entry: Entry, sweep: SweepFile, images: int, threads: int, out: Path) -> Job:
    train = entry.recipe.train
    steps = min(train.epochs * (images // train.global_batch), train.max_steps or sys.maxsize)
    cost = step_flops(flops_shape(entry.recipe))["total"] * train.global_batch * steps + _OVERHEAD
    log = out / "logs" / f"{entry.name}_seed_{entry.seed}.txt"
    return Job(entry.title, cost, work_run, (entry, sweep.evaluate, threads), log)


def _run(jobs: list[Job], side_by_side: int, threads: int, stop: StopRequest) -> dict[str, str]:
    """Run them; returns why by title of those that failed."""
    failed: dict[str, str] = {}
    done, total, began = [0.0, 0], sum(job.cost for job in jobs), time.monotonic()

    def report(ended: Ended) -> None:
        done[0] += ended.job.cost
        done[1] += 1
        if ended.code == STOPPED or (stop.requested and ended.code < 0):
            _say(f"[{done[1]}/{len(jobs)}] {ended.job.title}: stopped")
            return
        if ended.code:
            failed[ended.job.title] = _reason(ended)
        left = (time.monotonic() - began) * (total / done[0] - 1)
        how = f"FAILED: {failed[ended.job.title]}" if ended.code else f"done in {ended.seconds:.0f} s"
        _say(f"[{done[1]}/{len(jobs)}] {ended.job.title}: {how}; about {in_words(left)} left")

    run_jobs(jobs, side_by_side, threads, stop, report)
    return failed


def _reason(ended: Ended) -> str:
    """The last line of its log, or the signal."""
    if ended.code < 0:
        return f"killed by signal {-ended.code}; see {ended.job.log}"
    lines = ended.job.log.read_text(errors="replace").splitlines() if ended.job.log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"{last.removeprefix('lut-ds: ')} (exit {ended.code}; {ended.job.log})"


def _results(
    sweep: SweepFile, failed: dict[str, str], stop: StopRequest, pixels: Path, seconds: float
) -> dict[str, Any]:
    records = [record for entry in sweep.entries if (record := recorded(entry, sweep.evaluate)) is not None]
    there = {(record["name"], record["seed"]) for record in records}
    return {
        "sweep": str(sweep.path),
        "environment": environment() | {"cores": rank_cores()},
        "seconds": seconds,
        "evaluate": list(sweep.evaluate),
        "stopped_by": stop.signal_name,
        "failed": failed,
        "missing": [entry.title for entry in sweep.entries if (entry.name, entry.seed) not in there],
        "raw_pixels": json.loads(pixels.read_text()) if sweep.pixels and pixels.is_file() else None,
        "table": table.as_json(table.table_rows(records)),
        "runs": records,
    }


def _write(results: dict[str, Any], out: Path) -> str:
    """The files of FILES; returns what people see."""
    rows = table.table_rows(results["runs"])
    markdown = table.as_markdown(rows, results["raw_pixels"])
    write_aside(out / "sweep.json", (json.dumps(results, indent=1) + "\n").encode())
    write_aside(out / "table.md", markdown.encode())
    write_aside(out / "table.csv", table.as_csv(rows).encode())
    panels = {c: table.TITLES[c] for c in table.used_columns(rows) if c in _PANELS}
    if panels:
        found = results["raw_pixels"] and results["raw_pixels"]["found"]
        baselines = {"knn": found["knn"]["10"], "probe": found["probe"]} if found else {}
        lines = [(row.name, row.weights, row.values) for row in rows]
        write_aside(out / "sweep.png", png(draw_sweep(lines, panels, baselines)))
    notes = [f"FAILED {title}: {why}" for title, why in results["failed"].items()]
    if results["missing"]:
        notes.append(f"{len(results['missing'])} of the runs are missing; the same command goes on with them")
    return "\n".join([markdown, *notes, f"written to {out}: {', '.join(FILES)}"])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
