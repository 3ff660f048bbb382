"""The demo's page: what was learned, seen through nearest neighbours and reconstructions, before what every run can tell."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lut_ds import __version__
from lut_ds.analysis import page
from lut_ds.analysis.curves import draw_accuracy
from lut_ds.analysis.figures import Draw
from lut_ds.analysis.report import environment_section, recipe_section, training_section, write_report
from lut_ds.config import Recipe

NAMES = {
    "raw_pixels": "raw pixels",
    "random_encoder": "random encoder",
    "student": "student",
    "teacher": "teacher",
}


def draw_knn(knn: Mapping[str, Any]) -> Draw:
    """Student and teacher over the run, against what was not trained; `knn` is that of results.json."""
    k, top1, history = knn["k"], knn["top1"], knn["over_the_run"]
    trained = [name for name in ("student", "teacher") if name in top1]
    return draw_accuracy(
        [0.0, *(entry["epoch"] for entry in history)],
        {name: [top1["random_encoder"], *(_at(entry[name], k) for entry in history)] for name in trained},
        {NAMES[name]: value for name, value in top1.items() if name not in trained},
        f"k-NN top-1 on held-out images (k = {k})",
    )


def _at(by_k: Mapping[Any, float], k: int) -> float:
    """The value of k, whose key JSON turned into text."""
    return by_k[k] if k in by_k else by_k[str(k)]


def write_demo_page(
    path: Path, run: Path, recipe: Recipe, subject: str, results: Mapping[str, Any], panel: Draw
) -> Path:
    """Write the report of a demo.

    Args:
        run: its folder.
        subject: what the images show, for the title.
        results: what results.json holds.
        panel: the reconstructions.
    """
    sections = [
        _knn_section(results),
        _reconstruction_section(panel, recipe.method.norm_pix),
        training_section(run, recipe),
        recipe_section(recipe),
        environment_section(run),
    ]
    return write_report(
        path,
        title=f"{recipe.method.name.upper()} on {subject}",
        standfirst=_standfirst(results),
        lead=page.tiles(_tiles(results["knn"]["top1"])),
        sections=sections,
        eyebrow="lut-ds demo",
        footer=f"Made by lut-ds {__version__} from {run}. Numbers: results.json and metrics.jsonl in the same folder.",
    )


def _standfirst(results: Mapping[str, Any]) -> str:
    top1 = results["knn"]["top1"]
    best = "teacher" if top1.get("teacher", 0.0) > top1["student"] else "student"
    gain = top1[best] - top1["random_encoder"]
    return (
        f"After {results['epochs']:g} epochs on unlabelled images, a vote of the nearest neighbours in the {best}'s features is "
        f"right for {top1[best]:.1f} % of the held-out ones, {abs(gain):.1f} points {'above' if gain >= 0 else 'below'} the "
        "random encoder that the run started from."
    )


def _tiles(top1: Mapping[str, float]) -> list[page.Tile]:
    notes = {"raw_pixels": "no network", "random_encoder": "before training"}
    tones = {"student": "first", "teacher": "second"}
    return [
        page.Tile(
            f"{value:.1f}",
            "%",
            NAMES[name],
            notes.get(name) or f"{value - top1['random_encoder']:+.1f} against random",
            tones.get(name, ""),
        )
        for name, value in top1.items()
    ]


def _knn_section(results: Mapping[str, Any]) -> page.Section:
    knn, images = results["knn"], results["images"]
    how = (
        f"Each held-out image takes the class of its {knn['k']} most similar training images (cosine similarity, votes weighted "
        f"by a softmax at temperature {knn['temperature']}). No label was used in pre-training, and nothing is fitted here: the "
        "number tells how well the frozen features alone keep classes together."
    )
    top1 = knn["top1"]
    if top1["raw_pixels"] > max(top1["student"], top1.get("teacher", 0.0)):
        how += (
            f" Raw pixels give {top1['raw_pixels']:.1f} %: images this small and well centred are told apart by pixel distance "
            "alone, so the comparison that counts is with the random encoder."
        )
    by_k = knn["top1_by_k"]
    ks = list(by_k["raw_pixels"])
    rows = [[NAMES[name], *(f"{value:.1f}" for value in values.values())] for name, values in by_k.items()]
    caption = f"Top-1 in per cent on {images['val']:,} held-out images; neighbours are sought among {images['train']:,} training images."
    alt = "k-NN accuracy of student and teacher over the run"
    start = "Epoch 0 is the random encoder that the run started from."
    lowest = min(entry["student"][knn["k"]] for entry in knn["over_the_run"])
    if lowest < top1["random_encoder"] < top1["student"]:
        start += " The features fall below it before they organise; compare their spread under Training."
    return page.Section(
        "Nearest neighbours",
        page.text(how)
        + page.picture(draw_knn(knn), alt, start)
        + page.table(["features", *(f"k = {k}" for k in ks)], rows, caption),
    )


def _reconstruction_section(panel: Draw, norm_pix: bool) -> page.Section:
    caption = (
        "Held-out images, one a class, under a mask drawn once and for all. The student sees the patches that are not gray; its "
        "prediction is pasted over the gray ones."
    )
    if norm_pix:
        caption += (
            " It was trained on patches normalised one by one, so mean and contrast of each predicted patch are taken from the "
            "truth: judge the strokes inside the patches, not their brightness. A tint is an error of the prediction."
        )
    alt = "Held-out images: input, masked input and prediction side by side"
    return page.Section("Reconstruction", page.picture(panel, alt, caption, narrow=True))
