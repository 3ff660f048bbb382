"""`lut-ds sweep`: what is finished is recognised, the rest is run, and one table is made of what there is."""

import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lut_ds.analysis.figures import png, write_aside
from lut_ds.analysis.sweep_figure import draw_sweep
from lut_ds.data.outputs import writable_folder
from lut_ds.durations import in_words
from lut_ds.engine.build import flops_shape
from lut_ds.engine.launch import rank_cores
from lut_ds.engine.runfolder import claim, environment
from lut_ds.engine.signals import StopRequest, listen, listened
from lut_ds.engine.sweepfile import Entry, SweepFile, read_sweep
from lut_ds.engine.sweepstate import trained
from lut_ds.errors import UserError
from lut_ds.method.flops import step_flops
from lut_ds.sweep import table
from lut_ds.sweep.checks import Data, check_alone, check_sweep
from lut_ds.sweep.measure import recorded, recorded_pixels
from lut_ds.sweep.pool import Ended, Job, run_jobs, visible_devices
from lut_ds.sweep.worker import OUT_OF_TIME, STOPPED, work_pixels, work_run

FILES = ("sweep.json", "table.md", "table.csv", "sweep.png")
_PIXELS = "raw_pixels.json"
_OVERHEAD = 2e11  # FLOPs that take about as long as the start and the evaluation of a run
_PANELS = ("knn", "probe", "attention_distance", "effective_rank")


def run_sweep(
    path: Path, out: Path, overrides: Sequence[str], side_by_side: int, train: bool = True
) -> tuple[dict[str, Any], str]:
    """Run, or continue, a sweep; see `sweepfile` for the file.

    Args:
        out: folder for runs, logs and results.
        overrides: `section.key=value`, over all that the file says.
        side_by_side: runs at a time.
        train: False evaluates what is trained, by a job array perhaps, and leaves out the rest.

    Returns:
        What sweep.json holds, and the table for people. `failed` names runs that failed, with the last line of their logs;
        `stopped` those that a stop file or a time limit ended; `stopped_by` is what ended the sweep early.

    Raises:
        UserError: a file, recipe or data that cannot work, or a folder of another sweep, found before anything is trained.
        RunFault: an image that cannot be read.
    """
    check_alone()
    _refuse_foreign(out)
    began, sweep = time.monotonic(), read_sweep(path, out, overrides)
    data = check_sweep(sweep, _say)
    for folder in (out, out / "logs"):
        writable_folder(folder)
    with claim(out, "--out"), listen() as stop:
        rest = [entry for entry in sweep.entries if recorded(entry, sweep.evaluate) is None]
        todo = [entry for entry in rest if train or trained(entry)]
        threads = max(1, rank_cores() // max(1, min(side_by_side, len(todo))))
        jobs = _jobs(sweep, todo, data, threads, out)
        _say(f"{len(sweep.entries)} runs, {len(sweep.entries) - len(rest)} of them finished before; {out}")
        failed, stopped = _run(jobs, side_by_side, threads, stop)
        first = sweep.entries[0].recipe
        pixels = recorded_pixels(out / _PIXELS, first, data[str(first.data.path)]) if sweep.pixels else None
        results = _results(sweep, failed, stopped, stop, pixels, round(time.monotonic() - began, 1))
        return results, _write(results, out)


def _refuse_foreign(out: Path) -> None:
    """Results may take the place of a sweep's, of nothing else."""
    first, *others = FILES
    foreign = next((name for name in others if (out / name).exists()), None)
    if foreign is not None and not (out / first).is_file():
        raise UserError(f"--out: {out} holds a {foreign} and no {first}: it is of no sweep; name another folder")


def _jobs(sweep: SweepFile, todo: Sequence[Entry], data: Mapping[str, Data], threads: int, out: Path) -> list[Job]:
    """Of raw pixels, where they are asked for and not known, and of each run."""
    jobs, first = [], sweep.entries[0].recipe
    known = data[str(first.data.path)]
    if sweep.pixels and recorded_pixels(out / _PIXELS, first, known) is None:
        log = out / "logs" / "raw_pixels.txt"
        jobs.append(Job("raw pixels", _OVERHEAD, work_pixels, (first, known, out / _PIXELS, threads), log))
    for entry in todo:
        recipe, known = entry.recipe, data[str(entry.recipe.data.path)]
        steps = recipe.train.epochs * (known["train"]["images"] // recipe.train.global_batch)
        steps = 0 if trained(entry) else min(steps, recipe.train.max_steps or steps)
        cost = step_flops(flops_shape(recipe))["total"] * recipe.train.global_batch * steps + _OVERHEAD
        log = out / "logs" / f"{entry.name}_seed_{entry.seed}.txt"
        arguments = (entry, known, sweep.evaluate, threads)
        jobs.append(Job(entry.title, cost, work_run, arguments, log, listened(recipe.run.stop_signals)))
    return jobs


def _run(
    jobs: Sequence[Job], side_by_side: int, threads: int, stop: StopRequest
) -> tuple[dict[str, str], dict[str, str]]:
    """Run them; returns why by title, of those that failed, and of those that stopped though nobody stopped the sweep."""
    failed: dict[str, str] = {}
    stopped: dict[str, str] = {}
    done, total, began = [0.0, 0], sum(job.cost for job in jobs), time.monotonic()

    def report(ended: Ended) -> None:
        done[0] += ended.job.cost
        done[1] += 1
        left = (time.monotonic() - began) * (total / done[0] - 1)
        how = f"done in {ended.seconds:.0f} s; about {in_words(left)} left"
        if ended.code == OUT_OF_TIME:
            stop.signal_name = stop.signal_name or "time limit"  # it is the others' too
        if ended.code in (STOPPED, OUT_OF_TIME) or (stop.requested and ended.code < 0):
            how = "stopped"
            if not stop.requested:
                how = stopped[ended.job.title] = _reason(ended)
        elif ended.code:
            failed[ended.job.title] = _reason(ended)
            how = f"FAILED: {failed[ended.job.title]}; about {in_words(left)} left"
        _say(f"[{done[1]}/{len(jobs)}] {ended.job.title}: {how}")

    run_jobs(jobs, side_by_side, threads, stop, report, visible_devices())
    return failed, stopped


def _reason(ended: Ended) -> str:
    """The last line of its log, or the signal."""
    if ended.code < 0:
        hint = ", as the system does when memory runs out" if -ended.code == signal.SIGKILL else ""
        return f"killed by signal {-ended.code} ({signal.strsignal(-ended.code)}){hint}; see {ended.job.log}"
    lines = ended.job.log.read_text(errors="replace").splitlines() if ended.job.log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"{last.removeprefix('lut-ds: ')} (exit {ended.code}; {ended.job.log})"


def _results(
    sweep: SweepFile,
    failed: dict[str, str],
    stopped: dict[str, str],
    stop: StopRequest,
    pixels: dict[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    found = {entry.title: recorded(entry, sweep.evaluate) for entry in sweep.entries}
    records = [record for record in found.values() if record is not None]
    return {
        "sweep": str(sweep.path),
        "environment": environment() | {"cores": rank_cores()},
        "seconds": seconds,
        "evaluate": list(sweep.evaluate),
        "stopped_by": stop.signal_name,
        "failed": failed,
        "stopped": stopped,
        "missing": [title for title, record in found.items() if record is None],
        "raw_pixels": pixels,
        "table": table.as_json(table.table_rows(records)),
        "runs": records,
    }


def _write(results: dict[str, Any], out: Path) -> str:
    """The files of FILES; returns what people see."""
    rows = table.table_rows(results["runs"])
    markdown = table.as_markdown(rows, results["raw_pixels"]) + _notes(results)
    write_aside(out / "sweep.json", (json.dumps(results, indent=1) + "\n").encode())
    write_aside(out / "table.md", markdown.encode())
    write_aside(out / "table.csv", table.as_csv(rows).encode())
    panels = {c: table.TITLES[c] for c in table.used_columns(rows) if c in _PANELS}
    if panels:
        found = results["raw_pixels"] and results["raw_pixels"]["found"]
        baselines = {"knn": found["knn"]["10"], "probe": found["probe"]} if found else {}
        lines = [(row.name, row.weights, row.values) for row in rows]
        write_aside(out / "sweep.png", png(draw_sweep(lines, panels, baselines)))
    files = [name for name in FILES if panels or name != "sweep.png"]
    return f"{markdown}\nwritten to {out}: {', '.join(files)}"


def _notes(results: dict[str, Any]) -> str:
    """Below the table: what it lacks, and why."""
    missing, failed, stopped = results["missing"], results["failed"], results["stopped"]
    why = {title: f"FAILED: {reason}" for title, reason in failed.items()} | stopped
    lines = [f"- {title}: {why.get(title, 'not finished')}" for title in dict.fromkeys([*missing, *why])]
    if missing:
        total = len(missing) + len(results["runs"])
        lines.insert(0, f"{len(missing)} of {total} runs are missing; the same command goes on with them:\n")
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
