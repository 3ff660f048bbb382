"""`lut-ds report`: one page about a run, or about several beside each other, that needs nothing but itself."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lut_ds import __version__
from lut_ds.analysis import page
from lut_ds.analysis import run_sections as sections
from lut_ds.analysis.figures import Draw
from lut_ds.analysis.reconstruct import draw_reconstruction, fixed_noise, reconstruct
from lut_ds.analysis.report import write_report
from lut_ds.analysis.runs import RunRecord, read_runs, status, stored_analyses
from lut_ds.analysis.scores import headline
from lut_ds.data.loader import EvalLoader
from lut_ds.data.sources import Source, open_source
from lut_ds.errors import RunFault, UserError
from lut_ds.transfer.analyze import DRAWINGS, analyze, spread
from lut_ds.transfer.evaluate import Request, own_data
from lut_ds.transfer.load import find_checkpoint, load_student

SAMPLES = 8  # reconstructions of a run
ONE, SEVERAL = "run-report.html", "lut-ds-report.html"


def report(runs: Sequence[str], output: str | None = None, run_analyses: bool = False) -> dict[str, Any]:
    """Write the page.

    Args:
        runs: run folders, finished or not, of any command that trains.
        output: the file; None: `run-report.html` in the run, or `lut-ds-report.html` in the working folder for several.
        run_analyses: run `lut-ds analyze` on each first (of a fine-tuning on best/); one that cannot be analysed is a UserError.

    Returns:
        `file`, `bytes`, `sections` (their headings), `differences` (of the recipes, by key) and for each run its `name`,
        `folder`, `state`, `status`, `step`, `steps`, `epoch`, `images_per_second`, `last_epoch` (means) and `evaluations`.

    Raises:
        UserError: a folder that holds no run, or no place for the file.
    """
    found = read_runs(runs)
    path = Path(output) if output else (found[0].path / ONE if len(found) == 1 else Path(SEVERAL))
    if path.is_dir():
        raise UserError(f"--output: {path}: expected a file to write, found a folder; name a file in it")
    if output and path.is_file() and not path.read_bytes()[:15].lower().startswith(b"<!doctype html"):
        raise UserError(f"--output: {path}: expected a new file or an earlier page, found another file; name another")
    if any(parent.exists() and not parent.is_dir() for parent in path.parents):
        raise UserError(f"--output: {path}: expected a path of folders, found a file among them; name another file")
    if run_analyses:
        for run in found:
            analyze(_analysed(run), None, list(DRAWINGS))
    parts = [
        sections.overview(found),
        sections.training(found),
        sections.evaluations(found),
        sections.reconstructions({run.name: _reconstruction(run) for run in found if "method" in run.recipe}),
        sections.analyses(found, {run.name: stored_analyses(run) for run in found}),
        sections.recipes(found),
        sections.history(found),
        sections.environments(found),
    ]
    shown = [part for part in parts if part is not None]
    try:
        _write(path, found, shown)
    except PermissionError as error:
        raise UserError(f"--output: {path}: cannot be written: {error.strerror}; name another file") from error
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "sections": [part.heading for part in shown],
        "differences": sections.differences(found),
        "runs": [_about(run) for run in found],
    }


def _analysed(run: RunRecord) -> Request:
    """The newest encoder of a pre-training, or the best classifier of a fine-tuning."""
    if "method" in run.recipe:
        return Request(str(run.path))
    data = run.recipe.get("data", {}).get("path")
    return Request(str(run.path / "best"), data=data, output=str(run.path / "evaluations" / "analysis"))


def _about(run: RunRecord) -> dict[str, Any]:
    now = status(run)
    return {
        "name": run.name,
        "folder": str(run.path),
        "kind": run.kind,
        "state": now.state,
        "status": now.text,
        "step": run.step,
        "steps": run.steps,
        "epoch": run.epoch,
        "images_per_second": run.summary.images_per_second,
        "last_epoch": run.summary.last,
        "evaluations": headline(run),
    }


def _write(path: Path, runs: Sequence[RunRecord], shown: Sequence[page.Section]) -> None:
    names = [run.name for run in runs]
    title = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    write_report(
        path,
        title=title,
        standfirst=_standfirst(runs),
        lead=page.tiles(_tiles(runs[0]) if len(runs) == 1 else [_tile(run) for run in runs]),
        sections=shown,
        eyebrow="lut-ds report",
        footer=f"Made by lut-ds {__version__} on {time.strftime('%Y-%m-%d at %H:%M')}. Numbers: metrics.jsonl, events.jsonl and "
        "evaluations/ of the run folders.",
    )


def _standfirst(runs: Sequence[RunRecord]) -> str:
    if len(runs) == 1:
        run = runs[0]
        model = run.recipe.get("model", {})
        parts = {"width {}": "width", "{} blocks": "depth", "{} heads": "heads", "patches of {} px": "patch_size"}
        parts["images of {} px"] = "image_size"
        sizes = ", ".join(text.format(model[key]) for text, key in parts.items() if model.get(key) is not None)
        return f"{run.kind} of a ViT{': ' if sizes else ''}{sizes}. {status(run).sentence}"
    keys = list(sections.differences(runs))
    named = ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
    differ = f"Their recipes differ in {named}." if keys else "Their recipes are the same."
    return f"{len(runs)} runs beside each other. {differ}"


def _tile(run: RunRecord) -> page.Tile:
    """How far one of several runs came."""
    return page.Tile(f"{100 * run.step / run.steps:.0f}", "%", run.name, f"of {run.steps:,} steps, {status(run).state}")


def _tiles(run: RunRecord) -> list[page.Tile]:
    summary = run.summary
    per_step = summary.seconds / summary.steps if summary.steps else 0.0
    tiles = [
        page.Tile(f"{100 * run.step / run.steps:.0f}", "%", f"of {run.steps:,} steps", status(run).state),
        page.Tile(f"{summary.last['loss']:.4g}" if "loss" in summary.last else "none", "", "loss, last epoch"),
        page.Tile(_length(summary.seconds), "", "of training", f"{1000 * per_step:.0f} ms a step"),
        page.Tile(f"{summary.images_per_second:,.0f}", "", "images a second"),
    ]
    tones = ("first", "second")
    best = [(name, value) for name, value in headline(run).items() if "raw" not in name and "random" not in name]
    return tiles + [page.Tile(f"{v:.1f}", "", name, "", tone) for (name, v), tone in zip(best[:4], [*tones, "", ""])]


def _length(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _reconstruction(run: RunRecord) -> tuple[Draw, str] | str:
    """A panel with its caption, or a sentence that says why there is none."""
    try:
        checkpoint = find_checkpoint(run.path)
        if checkpoint.recipe.method.degradation != "none":
            return f"No pictures: the encoder sees {checkpoint.recipe.method.degradation} images, and masks alone are pictured."
        source = _images(own_data(str(run.path)))
        side = checkpoint.recipe.model.image_size
        chosen = spread(source, SAMPLES)
        pixels, _ = next(iter(EvalLoader(source, side, len(chosen), 1, chosen)))
    except (UserError, RunFault, OSError) as error:
        return f"No pictures: {error}"
    found = reconstruct(load_student(checkpoint), pixels, fixed_noise(len(pixels), checkpoint.recipe.model.patches))
    said = f"The student of step {checkpoint.step:,} under a mask drawn once and for all; its prediction is pasted over gray patches."
    if checkpoint.recipe.method.norm_pix:
        said += " Mean and contrast of each predicted patch are taken from the truth: judge what is inside the patches."
    return draw_reconstruction(found, [""] * len(pixels), blocks=2), said


def _images(data: str) -> Source:
    """Validation images where there are some, else the training images."""
    try:
        return open_source(data, "val")
    except UserError:
        return open_source(data, "train")


def describe(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{run['name']}: {run['status']}" for run in result["runs"]]
    return "\n".join([*lines, f"wrote {result['file']} ({result['bytes'] / 1e6:.1f} MB)"])
