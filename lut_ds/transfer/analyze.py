"""`lut-ds analyze`: checkpoints and data joined with the analyses of lut_ds.analysis; a JSON and two pictures for each.

Written to the output folder: ANALYSIS.json, ANALYSIS.png and, for dark pages, ANALYSIS-dark.png; of two runs beside each other to
a folder in each, so that the report of either has it. What was written stays when other analyses are run into the same folder.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lut_ds import __version__
from lut_ds.analysis import attention_distance, attention_maps, cka, relevance, spectrum
from lut_ds.analysis.figures import DARK, LIGHT, png, write_aside
from lut_ds.analysis.findings import sentence
from lut_ds.analysis.probes import draw_layers
from lut_ds.analysis.runs import short_names
from lut_ds.analysis.subject import Drawing, Found, Subject, check_attention
from lut_ds.data.loader import EvalLoader
from lut_ds.data.outputs import check_writable
from lut_ds.data.sources import Source, open_source
from lut_ds.errors import RunFault, UserError
from lut_ds.transfer.evaluate import Request, own_data, run_of
from lut_ds.transfer.features import Compute, computing
from lut_ds.transfer.labelled import open_labelled
from lut_ds.transfer.layer_probe import probe_layers
from lut_ds.transfer.models import PREFIX, Pretrained, load_model

DRAWINGS: dict[str, Drawing] = {
    "attention-distance": attention_distance.draw,
    "maps": attention_maps.draw,
    "relevance": relevance.draw,
    "spectrum": spectrum.draw,
    "cka": cka.draw,
    "layers": draw_layers,
}
NEED_ATTENTION = ("attention-distance", "maps", "relevance")


@dataclass(frozen=True)
class Scene:
    """All that was found good before anything is computed: models by name, with the images that they are shown.

    Attributes:
        models: one or two, by the name that figures use.
        train, val: train is None where the data have no labels.
        chosen: samples of train (for `layers`) and of val (for all).
        outputs: folders that all files are written to.
    """

    request: Request
    models: dict[str, Pretrained]
    train: Source | None
    val: Source
    chosen: tuple[NDArray[np.int64], NDArray[np.int64]]
    outputs: tuple[Path, ...]


def analyze(
    request: Request, other: str | None, only: Sequence[str], images: int = 256, train_images: int = 4000
) -> dict[str, Any]:
    """Analyse a checkpoint, or two beside each other.

    Args:
        request: the first checkpoint, the data, and how they are read.
        other: the second checkpoint, or None.
        only: names of DRAWINGS.
        images: of val, spread evenly over it; all where there are fewer.
        train_images: of train, likewise; `layers` alone uses them.

    Returns:
        `models` (records by name), `data`, `images`, `analyses` (what each found, by its name and the model's), `files`,
        `output` (the folder that they are in), `outputs` (that, and the second run's where the same files are too).

    Raises:
        UserError: a name, checkpoint or data that cannot be analysed, or labels missing for `layers`.
        RunFault: a model whose features are not finite.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("analyze: expected one process, found WORLD_SIZE above 1; start it without a launcher")
    scene = _prepare(request, other, only, images, train_images)
    found: dict[str, Any] = {}
    files: dict[str, str] = {}
    about = {
        "models": {name: model.record for name, model in scene.models.items()},
        "data": os.path.abspath(request.data or own_data(request.source)),
        "images": len(scene.chosen[1]),
        "pool": request.pool,
        "lut_ds": __version__,
    }
    with computing(request.batch_size, request.threads, request.precision) as compute:
        for model in scene.models.values():
            model.model.to(compute.ranks.device)
        subjects = [_subject(name, model, scene, compute) for name, model in scene.models.items()]
        for name in only:
            each = _run(name, scene, subjects, compute)
            found[name] = {who: value.numbers for who, value in each.items()}
            for folder in reversed(scene.outputs):
                written = _write(folder, name, each, {"analysis": name, **about, "found": found[name]})
            files |= written
    outputs = [str(folder) for folder in scene.outputs]
    return {**about, "analyses": found, "files": files, "output": outputs[0], "outputs": outputs}


def _prepare(request: Request, other: str | None, only: Sequence[str], images: int, train_images: int) -> Scene:
    unknown = [name for name in only if name not in DRAWINGS]
    if unknown or not only:
        raise UserError(
            f"--only: expected some of {', '.join(DRAWINGS)}, found {','.join(unknown) or 'none'}; correct it"
        )
    sources = [request.source] if other is None else [request.source, other]
    names = short_names([text.removeprefix(PREFIX).partition(":")[0] for text in sources])
    models = {
        name: load_model(source, request.kind, request.image_size, request.heads)
        for name, source in zip(names, sources, strict=True)
    }
    for name, model in models.items():
        if set(only) & set(NEED_ATTENTION):
            check_attention(model.model, name)
        if request.pool == "cls" and model.model.cls_token is None:
            raise UserError(f"--pool: expected a model with a cls token, found none in {name}; take --pool mean")
    data = request.data or own_data(request.source)
    train, val = _open(data, labels_needed="layers" in only)
    chosen = spread(train, train_images), spread(val, images)
    if "cka" in only:
        cka.check_images(len(chosen[1]), request.batch_size)
    outputs = _outputs(request, other, list(models))
    for output in outputs:
        check_writable(output=output)
    return Scene(request, models, train, val, chosen, outputs)


def _outputs(request: Request, other: str | None, names: Sequence[str]) -> tuple[Path, ...]:
    """The folder that was named; else one in the first run, or of that source, and one in the second run if that is another."""
    if request.output or other is None:
        return (request.folders("analysis")[0],)
    first, second = (f"analysis_with_{name.replace('/', '_')}" for name in reversed(names))
    places = (request.folders(first)[0], replace(request, source=other).folders(second)[0])
    own, theirs = (None if source.startswith(PREFIX) else run_of(source) for source in (request.source, other))
    return places if theirs is not None and (own is None or own.resolve() != theirs.resolve()) else places[:1]


def _open(data: str, labels_needed: bool) -> tuple[Source | None, Source]:
    """Labelled sets; where labels may be missing, and are, `val` alone."""
    try:
        return open_labelled(data)
    except UserError as error:
        if labels_needed:
            raise UserError(f"--only layers: {error}, or leave `layers` out") from error
    return None, open_source(data, "val")


def spread(source: Source | None, count: int) -> NDArray[np.int64]:
    """`count` samples evenly spread over a source, so that a folder's classes all have their share; all where it has fewer.

    In an order drawn once and for all: the first of them are a mixture too.
    """
    n = 0 if source is None else len(source)
    even = np.linspace(0, n - 1, min(count, n)).round().astype(np.int64)
    return np.random.default_rng(0).permutation(np.unique(even)) if n else np.zeros(0, np.int64)


def _subject(name: str, model: Pretrained, scene: Scene, compute: Compute) -> Subject:
    batches = list(EvalLoader(scene.val, model.image_size, compute.batch_size, compute.threads, scene.chosen[1]))
    labels = None if scene.train is None else torch.cat([labels for _, labels in batches])
    subject = Subject(
        name,
        model.model,
        torch.cat([pixels for pixels, _ in batches]),
        labels,
        model.normalised,
        functools.partial(model.features, pool=scene.request.pool),
        compute.batch_size,
    )
    with torch.no_grad():
        if not torch.isfinite(subject.features(next(subject.batches()))).all():
            raise RunFault(f"analyze: {name}: NaN or infinity in features of finite weights; take another checkpoint")
    return subject


def _run(name: str, scene: Scene, subjects: Sequence[Subject], compute: Compute) -> dict[str, Found]:
    """What an analysis finds, by the name of the model."""
    if name == "cka":
        return cka.measure(subjects)
    if name == "layers":
        train, val = scene.train, scene.val
        assert train is not None  # checked in _prepare
        return {
            each: Found(probe_layers(model, train, val, scene.chosen, compute), {})
            for each, model in scene.models.items()
        }
    measures: dict[str, Callable[[Subject], Found]] = {
        "attention-distance": attention_distance.measure,
        "maps": attention_maps.measure,
        "relevance": functools.partial(relevance.measure, pools_patches=scene.request.pool == "mean"),
        "spectrum": spectrum.measure,
    }
    return {subject.name: measures[name](subject) for subject in subjects}


def _write(folder: Path, name: str, found: Mapping[str, Found], record: Mapping[str, Any]) -> dict[str, str]:
    def draw(theme: Any) -> Any:
        return DRAWINGS[name](theme, list(found.items()))

    paths = {"png": folder / f"{name}.png", "json": folder / f"{name}.json"}
    write_aside(paths["png"], png(draw, LIGHT))
    write_aside(folder / f"{name}-dark.png", png(draw, DARK))
    write_aside(paths["json"], (json.dumps(record, indent=1) + "\n").encode())
    return {f"{name}.{kind}": str(path) for kind, path in paths.items()}


def describe(results: Mapping[str, Any]) -> str:
    """The main number of each analysis, for people."""
    lines = [f"{name}: {record['source']}" for name, record in results["models"].items()]
    for name, found in results["analyses"].items():
        lines += [f"  {name:18} {who}: {sentence(name, each)}" for who, each in found.items()]
    return "\n".join([*lines, f"written to {' and '.join(results['outputs'])}"])
