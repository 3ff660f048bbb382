"""What an fp8 teacher changes: its features beside those in bf16 and fp32, and the losses of runs that learn from it.

python benchmarks/fp8_teacher.py [--steps 300]     writes benchmarks/fp8_teacher.json and fp8_teacher.png; minutes on a CPU

On a CPU the 8-bit values are those of a GPU, multiplied in fp32; a GPU's tensor cores add with fewer bits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
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
RUNS = {"fp32": ("fp32", 0), "bf16": ("bf16", 0), "fp8": ("fp8", 0), "bf16, another seed": ("bf16", 1)}
IMAGES = 32


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
        student.load_state_dict(weights, strict=False)
    views, found = smooth_images(recipe.model.image_size), {}
    for precision in PRECISIONS:
        changed = recipe.model_copy(update={"precision": recipe.precision.model_copy(update={"teacher": precision})})
        teacher = build_teacher(changed, student, torch.device("cpu"))
        assert teacher is not None
        found[precision] = outputs(teacher, views)
    pairs = (("bf16", "fp32"), ("fp8", "fp32"), ("fp8", "bf16"))
    return {f"{a} against {b}": {kind: compare(found[a][kind], found[b][kind]) for kind in found[a]} for a, b in pairs}


def train(digits: Path, folder: Path, precision: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """A run of the demo's recipe; its records."""
    words = [f"data.path={digits}", f"run.dir={folder}", f"run.seed={seed}", f"precision.teacher={precision}"]
    command = [sys.executable, "-m", "lut_ds", "pretrain", "demo", *words, f"train.max_steps={steps}", "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_metrics(folder / "metrics.jsonl")


def mean_difference(a: list[dict[str, Any]], b: list[dict[str, Any]], key: str) -> float:
    """Mean of |a - b| over the steps, relative to b."""
    return sum(abs(x[key] - y[key]) / abs(y[key]) for x, y in zip(a, b, strict=True)) / len(a)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        digits = write_digits(Path(work) / "digits")
        records = {
            name: train(digits, Path(work) / name.replace(" ", "_"), precision, seed, steps)
            for name, (precision, seed) in RUNS.items()
        }
        trained = read_weights(step_folders(Path(work) / "fp8" / "checkpoints")[-1], "ema")
        table = {
            "ViT-S/16, fresh weights": errors(load_recipe("lut_vits16"), None),
            "demo, fresh weights": errors(load_recipe("demo"), None),
            f"demo, after {steps} steps with the fp8 teacher": errors(load_recipe("demo"), trained),
        }
    last = max(1, steps // 10)
    report = {
        "machine": describe_machine() | {"command": f"python benchmarks/fp8_teacher.py --steps {steps}"},
        "errors": table,
        "training": {
            "recipe": "demo (student fp32)",
            "steps": steps,
            "mean_of_last_tenth": {
                name: {key: sum(r[key] for r in found[-last:]) / last for key in ("loss", "mae", "bc")}
                for name, found in records.items()
            },
            "mean_relative_difference_from_bf16": {
                name: {key: mean_difference(found, records["bf16"], key) for key in ("loss", "mae", "bc")}
                for name, found in records.items()
                if name != "bf16"
            },
            "curves": {
                name: {key: [round(r[key], 5) for r in found[::5]] for key in ("loss", "mae", "bc", "feature_spread")}
                for name, found in records.items()
            },
        },
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(report) + "\n")
    curves = [(f"teacher {name}", found) for name, found in records.items()]
    write_aside(Path(__file__).with_suffix(".png"), png(draw_runs(curves, ("loss", "mae", "bc", "feature_spread"))))
    print(json.dumps({"errors": table, **{k: v for k, v in report["training"].items() if k != "curves"}}, indent=1))


if __name__ == "__main__":
    main()
