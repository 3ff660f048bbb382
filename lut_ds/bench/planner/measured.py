"""Measured steps instead of assumed efficiency: reports of `lut-ds bench step --json` that a plan may read.

`measured.json` beside this file holds the committed ones, a list (empty until a GPU was measured).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lut_ds.bench.planner.devices import Device
from lut_ds.config import Recipe
from lut_ds.engine.build import flops_shape
from lut_ds.errors import UserError
from lut_ds.method.flops import step_flops

COMMITTED = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Measured:
    """The utilisation of one GPU in one measured step, its optimizer and EMA included.

    Attributes:
        mfu: low, median and high over the rounds.
        images: of the measured micro-batch.
        exact: whether it is the model and method that is planned; else a model of another size.
        what: for people.
    """

    mfu: tuple[float, float, float]
    images: int
    exact: bool
    what: str


def measured_for(recipe: Recipe, device: Device, file: str | None) -> Measured | None:
    """The measurement of this GPU that is nearest to the recipe; None if there is none.

    Args:
        file: one more report, or list of them, of `lut-ds bench step --json`; the committed ones are read always.

    Raises:
        UserError: the file is not such a report, or holds none of this GPU.
    """
    own = [] if file is None else _reports(Path(file))
    fitting = [report for report in [*own, *_reports(COMMITTED)] if _fits(report, recipe, device)]
    if own and not any(report in own for report in fitting):
        raise UserError(
            f"--measured {file}: expected a step of {recipe.method.name} in {recipe.precision.compute} on one {device.name}, "
            "found none; measure there with: lut-ds bench step RECIPE --json"
        )
    wanted = step_flops(flops_shape(recipe))["total"]
    best = min(fitting, key=lambda report: (abs(report["flops"]["total"] - wanted), report not in own), default=None)
    return None if best is None else _measured(best, recipe, device)


def _reports(file: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--measured {file}: not readable as JSON: {error}") from error
    reports = found if isinstance(found, list) else [found]
    for report in reports:
        try:
            _keys(report)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"--measured {file}: expected what lut-ds bench step --json prints, found no usable {error}"
            ) from error
    return reports


def _keys(report: dict[str, Any]) -> None:
    """Touch everything that is read later, so that a wrong file is refused at once."""
    speed = report["sides"]["ours"]["images_per_s"]
    numbers = [speed[key] for key in ("min", "median", "max")] + [report["flops"]["total"], report["options"]["batch"]]
    if not all(isinstance(n, int | float) and n > 0 for n in numbers):
        raise ValueError("images_per_s, flops or batch above 0")
    _ = report["machine"]["gpu"], report["model"]["width"], report["method"], report["options"]["world_size"]


def _fits(report: dict[str, Any], recipe: Recipe, device: Device) -> bool:
    gpu, options = report["machine"]["gpu"], report["options"]
    precision = report.get("precision", {}).get("compute", recipe.precision.compute)
    same = report["method"] == recipe.method.name and precision == recipe.precision.compute
    return bool(gpu and device.name in gpu and options["device"] == "cuda" and options["world_size"] == 1 and same)


def _measured(report: dict[str, Any], recipe: Recipe, device: Device) -> Measured:
    speed, flops = report["sides"]["ours"]["images_per_s"], report["flops"]["total"]
    peak = device.peak if recipe.precision.compute == "bf16" else device.peak_fp32
    low, median, high = (speed[key] * flops / peak for key in ("min", "median", "max"))
    exact = report["model"] == recipe.model.model_dump()
    machine, width = report["machine"], report["model"]["width"]
    what = f"{speed['median']:.0f} images/s of {report['method']} at width {width} on {machine['gpu']}"
    images = int(report["options"]["batch"])
    return Measured((low, median, high), images, exact, f"{what}, batch {images}, {machine.get('date', 'no date')}")
