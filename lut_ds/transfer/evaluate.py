"""k-NN and linear probes from a source of weights to results.json: load, extract (or find) the features, evaluate, write."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lut_ds.analysis.figures import png, write_aside
from lut_ds.analysis.probes import draw_history, draw_knn_by_k, draw_sweep
from lut_ds.data.outputs import check_writable
from lut_ds.data.sources import Source
from lut_ds.errors import UserError
from lut_ds.transfer.features import Compute, Features, computing, extract
from lut_ds.transfer.knn import knn_predict
from lut_ds.transfer.labelled import open_labelled
from lut_ds.transfer.linear import LinearProbe, Protocol, check_batch, evaluate_head
from lut_ds.transfer.load import Kind, find_checkpoint
from lut_ds.transfer.models import PREFIX, Pool, Pretrained, load_model
from lut_ds.transfer.probe import Sweep, probe_features
from lut_ds.transfer.probe_accuracy import per_class, write_head, write_results

STUDENT = "_student"  # ends the name of a folder with results of --student


@dataclass(frozen=True)
class Request:
    """What to evaluate, on what, and where results go.

    Attributes:
        source, kind, image_size, heads: see `models.load_model`.
        data: folder with train/<class>/ and val/<class>/; None for a run's own data.
        pool: how tokens become one vector.
        output: folder of the results; None: see `folders`, in `evaluations/` of the run, or of runs/ for other sources.
        cache: folder of the features; None: `evaluations/features` beside.
    """

    source: str
    kind: Kind | None = None
    data: str | None = None
    pool: Pool = "mean"
    image_size: int | None = None
    heads: int | None = None
    output: str | None = None
    cache: str | None = None
    batch_size: int = 128
    threads: int | None = None
    precision: str = "fp32"

    def folders(self, name: str) -> tuple[Path, Path]:
        """Results and cache of the evaluation `name`; the student's, where they were asked for, lie beside the average's."""
        base = _evaluations(self.source)
        own = f"{name}{STUDENT}" if self.kind == "student" else name
        return Path(self.output or base / own), Path(self.cache or base / "features")


@dataclass(frozen=True)
class Subject:
    """A request whose model and data were found good."""

    model: Pretrained
    train: Source
    val: Source
    data: str
    output: Path
    cache: Path


def evaluate_knn(request: Request, ks: tuple[int, ...], temperature: float) -> dict[str, Any]:
    """k-NN top-1 on the validation images, for each k, with results.json and knn.png.

    Raises:
        UserError: a model or data that cannot be evaluated, or a k above the number of training images.
    """
    subject = _prepare(request, "knn")
    if max(ks) > len(subject.train):
        raise UserError(f"--k: {max(ks)} is above the {len(subject.train)} training images; give a smaller k")
    with computing(request.batch_size, request.threads, request.precision) as compute:
        bank, queries = _both(subject, request.pool, compute)
        predicted = _predict(bank, queries, ks, temperature, compute)
        right = {k: predicted[k] == queries.labels for k in ks}
        top1 = {str(k): 100.0 * right[k].double().mean().item() for k in ks}
        best = max(ks, key=lambda k: top1[str(k)])
        results = {
            **_about(subject, request, "knn", bank, queries),
            "temperature": temperature,
            "top1": top1,
            "best_k": best,
            "per_class": per_class(right[best], queries.labels, subject.val.classes),
        }
        if compute.ranks.main:
            write_results(subject.output / "results.json", results)
            write_aside(subject.output / "knn.png", png(lambda theme: draw_knn_by_k(theme, results)))
    return results


def evaluate_quick(request: Request, sweep: Sweep) -> dict[str, Any]:
    """The quick linear probe, with results.json, head.safetensors and probe.png. UserError as `evaluate_knn`."""
    subject = _prepare(request, "probe")
    with computing(request.batch_size, request.threads, request.precision) as compute:
        bank, queries = _both(subject, request.pool, compute)
        pairs = ((bank.values, bank.labels), (queries.values, queries.labels))
        found, head = probe_features(*pairs, subject.train.classes, sweep, compute.ranks)
        results = {**_about(subject, request, "probe", bank, queries), "protocol": "quick", **found}
        if compute.ranks.main:
            _write_probe(subject, results, head)
            write_aside(subject.output / "probe.png", png(lambda theme: draw_sweep(theme, results)))
    return results


def evaluate_linear(request: Request, protocol: Protocol) -> dict[str, Any]:
    """MAE's linear probe, with results.json, head.safetensors, probe.safetensors (to continue from) and probe.png.

    Returns:
        As the quick one, and `history` by epoch; after a signal `stopped_by`, `step`, `steps` alone, and no results.json.
    """
    subject = _prepare(request, "probe_mae")
    with computing(request.batch_size, request.threads, request.precision) as compute:
        check_batch(protocol.batch, len(subject.train), compute.ranks.world_size)
        queries = extract(subject.model, request.pool, subject.val, "val", subject.cache, compute)
        probe = LinearProbe(subject.model, request.pool, subject.train, queries, protocol, subject.output, compute)
        outcome = probe.run()
        if outcome.stopped_by:
            return {"stopped_by": outcome.stopped_by, "step": outcome.step, "steps": outcome.steps}
        found, head = evaluate_head(outcome.head, queries, subject.train.classes)
        about = _about(subject, request, "probe", None, queries)
        settings = {"epochs": probe.epochs, "batch": protocol.batch, "lr": protocol.lr, "seed": protocol.seed}
        results = {**about, "protocol": "mae", "settings": settings, **found, "history": outcome.history}
        if compute.ranks.main:
            _write_probe(subject, results, head)
            write_aside(subject.output / "probe.png", png(lambda theme: draw_history(theme, results)))
    return results


def _prepare(request: Request, name: str) -> Subject:
    model = load_model(request.source, request.kind, request.image_size, request.heads)
    data = request.data or own_data(request.source)
    train, val = open_labelled(data)
    output, cache = request.folders(name)
    check_writable(output=output, cache=cache)
    return Subject(model, train, val, data, output, cache)


def own_data(source: str) -> str:
    """The data that a run was trained on."""
    run = None if source.startswith(PREFIX) else run_of(source)
    if run is None:
        raise UserError("--data: expected a folder with train/<class>/ and val/<class>/, found none; name it")
    best = run / "best" / "config.json"
    path = _classified(best) if best.is_file() else find_checkpoint(source).recipe.data.path
    inside = run / "data"  # the demo's own digits; their path, as the recipe has it, may be relative to another folder
    elsewhere = path is not None and Path(path).is_absolute() and Path(path).exists()
    return str(inside) if inside.is_dir() and not elsewhere else str(path)


def _classified(config: Path) -> str:
    """What a fine-tuning was trained on, by the config.json of its best epoch."""
    try:
        path = json.loads(config.read_text())["lut_ds"]["recipe"]["data"]["path"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--data: {config}: expected the data of its training, found none; name them") from error
    return str(path)


def run_of(source: str) -> Path | None:
    """The run that a run folder, its checkpoints, or one of them belongs to."""
    path = Path(source)
    for folder in (path, *path.parents[:2]):
        if (folder / "checkpoints").is_dir():
            return folder
    return None


def _evaluations(source: str) -> Path:
    if not source.startswith(PREFIX) and (run := run_of(source)) is not None:
        return run / "evaluations"
    name = source.replace("/", "_").replace(":", "_").strip("._")
    return Path("runs") / "evaluations" / name


def _both(subject: Subject, pool: Pool, compute: Compute) -> tuple[Features, Features]:
    return (
        extract(subject.model, pool, subject.train, "train", subject.cache, compute),
        extract(subject.model, pool, subject.val, "val", subject.cache, compute),
    )


def _predict(
    bank: Features, queries: Features, ks: tuple[int, ...], temperature: float, compute: Compute
) -> dict[int, Tensor]:
    """Classes of all queries, int64 [Q] for each k, the same on every rank: each rank finds those of its share."""
    device, world = compute.ranks.device, compute.ranks.world_size
    mine = torch.arange(compute.ranks.rank, len(queries.values), world)
    known = (bank.values.to(device), bank.labels.to(device))
    own = knn_predict(*known, queries.values[mine].to(device), ks, temperature) if len(mine) else None
    predicted = {}
    for k in ks:
        whole = torch.zeros(len(queries.values), dtype=torch.int64, device=device)
        if own is not None:
            whole[mine.to(device)] = own[k]
        if world > 1:
            dist.all_reduce(whole)  # every query is one rank's, and 0 elsewhere
        predicted[k] = whole.cpu()
    return predicted


def _about(
    subject: Subject, request: Request, evaluation: Literal["knn", "probe"], bank: Features | None, queries: Features
) -> dict[str, Any]:
    return {
        "evaluation": evaluation,
        "model": subject.model.record,
        "data": os.path.abspath(subject.data),
        "images": {"train": len(subject.train), "val": len(subject.val)},
        "classes": len(subject.train.classes),
        "pool": request.pool,
        "precision": request.precision,
        "computed": {"train": bank.computed if bank else 0, "val": queries.computed},
        "output": str(subject.output),
    }


def _write_probe(subject: Subject, results: dict[str, Any], head: dict[str, Tensor]) -> None:
    write_head(subject.output / "head.safetensors", head, subject.train.classes)
    write_results(subject.output / "results.json", results)
