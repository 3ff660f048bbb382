"""The report of a run: what every run folder can tell, as sections; and the page around them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lut_ds.analysis import page
from lut_ds.analysis.curves import TITLES, curve_keys, draw_curves, run_metrics
from lut_ds.analysis.figures import write_aside
from lut_ds.config import Recipe
from lut_ds.method.masking import keep_count

CURVES = "Line: mean of a few consecutive steps; band: their lowest and highest value. Axes start at zero and nothing is cut off."


@dataclass(frozen=True)
class TrainingSummary:
    """A run in numbers: steps, epochs, seconds of training (over all resumes), images a second, and each metric's mean in
    the first and in the last epoch."""

    steps: int
    epochs: float
    seconds: float
    images_per_second: float
    first: dict[str, float]
    last: dict[str, float]


def summarise(records: Sequence[dict[str, Any]], global_batch: int) -> TrainingSummary:
    """Sum up a run's metrics."""
    seconds, counted, before = 0.0, 0, 0
    for record in records:
        if "images_per_s" in record:
            seconds += (record["step"] - before) * global_batch / record["images_per_s"]
            counted += (record["step"] - before) * global_batch
            before = record["step"]
    end = records[-1]["epoch"]
    early = [r for r in records if r["epoch"] <= min(1.0, end)]
    late = [r for r in records if r["epoch"] > max(end - 1, 0.0)]
    names = [key for key in curve_keys(records) if key != "lr"]
    return TrainingSummary(
        records[-1]["step"],
        end,
        seconds,
        counted / seconds if seconds else 0.0,
        _means(early, names),
        _means(late, names),
    )


def _means(records: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, float]:
    finite = {name: [r[name] for r in records if r.get(name) is not None] for name in names}
    return {name: sum(values) / len(values) for name, values in finite.items() if values}


def training_section(run: Path, recipe: Recipe) -> page.Section:
    """Curves, and the metrics of the first and last epoch."""
    records = run_metrics(run)
    summary = summarise(records, recipe.train.global_batch)
    caption = f"{CURVES} A spread near 0 would mean that all images get the same feature (collapse); 1 is isotropic."
    pictures = page.picture(
        draw_curves(records), "Curves of losses, feature spread and learning rate over epochs", caption
    )
    sentence = training_sentence(summary, recipe.train.global_batch)
    return page.Section("Training", page.text(sentence) + pictures + epoch_means(summary))


def training_sentence(summary: TrainingSummary, global_batch: int) -> str:
    """How much was trained, and how fast."""
    return (
        f"{summary.steps:,} steps of {global_batch} images, {summary.epochs:.4g} epochs, in "
        f"{summary.seconds:.0f} seconds of training: {summary.images_per_second:,.0f} images a second."
    )


def epoch_means(summary: TrainingSummary) -> str:
    """A table of each metric's mean in the first and in the last epoch."""
    rows = [
        [TITLES[name], f"{summary.first[name]:.4g}", f"{summary.last[name]:.4g}"]
        for name in summary.first
        if name in summary.last
    ]
    return page.table(["mean over an epoch", "first", "last"], rows)


def recipe_section(recipe: Recipe) -> page.Section:
    """The resolved recipe, folded by section."""
    m, method = recipe.model, recipe.method
    keep = keep_count(m.patches, method.mask_ratio)
    views = "each of two views" if method.views == 2 else "its view"
    summary = (
        f"A ViT of width {m.width}, {m.depth} blocks and {m.heads} heads reads {m.image_size} x {m.image_size} pixels as "
        f"{m.patches} patches of {m.patch_size} x {m.patch_size}; the student sees {keep} of them in {views}."
    )
    tree = json.loads(recipe.model_dump_json())
    parts = (page.folded(name, page.facts(values)) for name, values in tree.items())
    return page.Section("Recipe", page.text(summary) + "".join(parts))


def environment_section(run: Path) -> page.Section:
    """Where and with what the run was last started."""
    lines = (run / "environment.jsonl").read_text().splitlines()
    last: dict[str, Any] = json.loads(lines[-1])
    versions = last.pop("versions")
    git = last.pop("git")
    if git is not None:
        last["git"] = git["commit"][:12] + (", with local changes" if git["dirty"] else "")
    last["starts"] = len(lines)
    return page.Section("Environment", page.facts(last) + page.folded("package versions", page.facts(versions)))


def write_report(
    path: Path, title: str, standfirst: str, lead: str, sections: Sequence[page.Section], eyebrow: str, footer: str
) -> Path:
    """Write the page whole or not at all."""
    return write_aside(path, page.page(eyebrow, title, standfirst, lead, sections, footer).encode())
