"""What a bf16 or fp8 teacher changes: its features beside those in fp32, and the losses of runs that learn from it.

python benchmarks/fp8_teacher.py [--steps 300] [--seeds 5]     writes benchmarks/fp8_teacher.json and fp8_teacher.png; runs of a
minute of one core, `--seeds` of them for each precision of the teacher

On a CPU the 8-bit values are those of a GPU, multiplied in fp32; a GPU's tensor cores add with fewer bits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lut_ds.analysis.curves import draw_runs
from lut_ds.analysis.figures import png, write_aside
from lut_ds.bench.machine import describe_machine
from lut_ds.config import Recipe, load_recipe
from lut_ds.data.digits import write_digits
from lut_ds.engine.build import build_student, build_teacher
from lut_ds.engine.checkpoint import step_folders
from lut_ds.engine.state import read_weights
from lut_ds.method.lut import Teacher, encode_views, pool
from lut_ds.tracking import read_metrics

PRECISIONS = ("fp32", "bf16", "fp8")
KEYS = ("loss", "mae", "bc")
IMAGES = 32
SNAPSHOT = 50  # steps between the teachers whose features are compared


def smooth_images(side: int) -> list[Tensor]:
    """Two views uint8 [b, S, S, 3] of noise with the large scales of photographs."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand((2, IMAGES, 3, 8, 8), generator=generator)
    large = [F.interpolate(view, (side, side), mode="bicubic").clamp(0, 1) for view in small]
    return [(view.permute(0, 2, 3, 1) * 255).to(torch.uint8).contiguous() for view in large]


@torch.no_grad()
def outputs(teacher: Teacher, views: list[Tensor]) -> dict[str, Tensor]:
    """Pooled features and projections, fp32 [2b, D] each."""
    pooled = pool(encode_views(teacher.encoder, views, None))
    return {"pooled features": pooled.float(), "projections": teacher.projector(pooled).float()}


def compare(found: Tensor, expected: Tensor) -> dict[str, float]:
    """How far features [n, D] are from others; `centred`: after the mean over images, which all share, is taken out."""
    centred = [t - t.mean(0) for t in (found, expected)]
    return {
        "relative_error": float((found - expected).norm() / expected.norm()),
        "cosine_least": float(F.cosine_similarity(found, expected).min()),
        "centred_relative_error": float((centred[0] - centred[1]).norm() / centred[1].norm()),
    }


def errors(recipe: Recipe, weights: dict[str, Tensor] | None) -> dict[str, Any]:
    """Every pair of precisions, from the same fp32 weights (fresh ones if None)."""
    student = build_student(recipe)
    if weights is not None:
        missing, unknown = student.load_state_dict(weights, strict=False)
        assert not unknown
        assert all("pos_embed" in name for name in missing), missing
    views, found = smooth_images(recipe.model.image_size), {}
    for precision in PRECISIONS:
        changed = recipe.model_copy(update={"precision": recipe.precision.model_copy(update={"teacher": precision})})
        teacher = build_teacher(changed, student, torch.device("cpu"))
        assert teacher is not None
        found[precision] = outputs(teacher, views)
    pairs = (("bf16", "fp32"), ("fp8", "fp32"), ("fp8", "bf16"))
    return {f"{a} against {b}": {kind: compare(found[a][kind], found[b][kind]) for kind in found[a]} for a, b in pairs}


def train(digits: Path, folder: Path, precision: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """A run of the demo's recipe, with all its checkpoints; its records."""
    words = [f"data.path={digits}", f"run.dir={folder}", f"run.seed={seed}", f"precision.teacher={precision}"]
    words += [f"train.max_steps={steps}", f"run.save_every={SNAPSHOT}", "run.keep_last=1000"]
    command = [sys.executable, "-m", "lut_ds", "pretrain", "demo", *words, "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_metrics(folder / "metrics.jsonl")


def last_tenth(records: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the last tenth of a run."""
    last = records[-max(1, len(records) // 10) :]
    return {key: sum(r[key] for r in last) / len(last) for key in KEYS}


def over_seeds(runs: list[list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of the last tenths: mean over seeds, standard deviation, least and largest."""
    ends = [last_tenth(records) for records in runs]
    found = {key: [end[key] for end in ends] for key in KEYS}
    return {
        key: {"mean": mean(v), "deviation": stdev(v) if len(v) > 1 else 0.0, "min": min(v), "max": max(v)}
        for key, v in found.items()
    }


def paired(runs: list[list[dict[str, Any]]], others: list[list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Last tenths of runs less those of others, seed by seed."""
    ends = [(last_tenth(a), last_tenth(b)) for a, b in zip(runs, others, strict=True)]
    return {key: [a[key] - b[key] for a, b in ends] for key in KEYS}


def mean_curve(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Records whose losses are means over runs."""
    keys = (*KEYS, "feature_spread")
    return [{**step[0], **{key: mean(r[key] for r in step) for key in keys}} for step in zip(*runs, strict=True)]


def along(runs: Path) -> dict[str, Any]:
    """Errors of the teachers on the way: averages of every SNAPSHOT steps of a run, in every precision."""
    recipe = load_recipe("demo")
    found = {}
    for folder in step_folders(runs / "checkpoints"):
        pairs = errors(recipe, read_weights(folder, "ema"))
        found[folder.name] = {
            f"{kind}, {pair}": values["centred_relative_error"]
            for pair, kinds in pairs.items()
            for kind, values in kinds.items()
            if pair.endswith("fp32")
        }
    return found


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        digits = write_digits(Path(work) / "digits")
        records = {
            precision: [
                train(digits, Path(work) / f"{precision}{seed}", precision, seed, args.steps)
                for seed in range(args.seeds)
            ]
            for precision in PRECISIONS
        }
        table = {
            "ViT-S/16, fresh weights": errors(load_recipe("lut_vits16"), None),
            "demo, fresh weights": errors(load_recipe("demo"), None),
        }
        on_the_way = {precision: along(Path(work) / f"{precision}0") for precision in PRECISIONS}
    curves = {precision: mean_curve(runs) for precision, runs in records.items()}
    command = f"python benchmarks/fp8_teacher.py --steps {args.steps} --seeds {args.seeds}"
    report = {
        "machine": describe_machine() | {"command": command},
        "errors": table,
        "centred_errors_of_demo_teachers_seed_0": on_the_way,
        "training": {
            "recipe": "demo (student fp32)",
            "steps": args.steps,
            "seeds": args.seeds,
            "last_tenth": {precision: over_seeds(runs) for precision, runs in records.items()},
            "last_tenth_of_each_seed": {
                precision: [last_tenth(run) for run in runs] for precision, runs in records.items()
            },
            "last_tenth_less_fp32_of_the_same_seed": {
                precision: paired(records[precision], records["fp32"]) for precision in ("bf16", "fp8")
            },
            "mean_curves": {
                precision: {key: [round(r[key], 5) for r in found[::5]] for key in (*KEYS, "feature_spread")}
                for precision, found in curves.items()
            },
        },
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(report) + "\n")
    named = [(f"teacher {name}, mean of {args.seeds} seeds", found) for name, found in curves.items()]
    write_aside(Path(__file__).with_suffix(".png"), png(draw_runs(named, (*KEYS, "feature_spread"))))
    shown = {key: value for key, value in report["training"].items() if key != "mean_curves"}
    print(json.dumps({"errors": table, "on_the_way": on_the_way, **shown}, indent=1))


if __name__ == "__main__":
    main()
