"""The plan beside what was counted: python -m tests.bench.plan_check > benchmarks/planner_cpu.json (some CPU minutes)."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lut_kernels import kernels_mode

from lut_ds.bench.machine import describe_machine
from lut_ds.config import Recipe, load_recipe, parse_recipe
from lut_ds.engine.activations import activations, with_checkpointing
from tests.bench.peak_check import FP32
from tests.bench.test_counted import CHANGES, planned_bytes, planned_states, run_counting, tree
from tests.engine.kept import kept_an_image
from tests.engine.tiny import tiny_tree

WORLD_SIZES = (2, 4)
PEAKS = (
    ("lut_vits16", "16", *FP32, "train.deepspeed=zero1"),
    ("lut_vits16", "16", "train.deepspeed=zero2"),
    ("lut_vitb16", "8", *FP32, "train.deepspeed=zero1", "train.activation_checkpointing=true"),
)


def compared(planned: float, counted: float) -> dict[str, float]:
    """Bytes, and planned over counted."""
    return {"planned": planned, "counted": counted, "ratio": planned / counted if counted else 1.0}


def counted_case(name: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """A case of `test_counted`: bytes a step of rank 0's collectives, and of the states of the rank that has most."""
    sent, states = planned_bytes(name, len(ranks)), planned_states(name, len(ranks))
    held = ranks[0]["held"]
    return {
        "sent": {kind: compared(sent[kind], found) for kind, found in ranks[0]["sent"].items()},
        "held": {part: compared(states[part], max(rank["held"][part] for rank in ranks)) for part in held},
    }


def kept_cases() -> dict[str, Any]:
    """Activations an image."""
    found = {}
    for model in ("tiny", "lut_vits16"):
        for method in ("lut", "mae"):
            for compute in ("fp32", "bf16"):
                recipe = small_recipe(model, method, compute)
                for again in (False, True):
                    changed = with_checkpointing(recipe, again)
                    name = f"{model} {method} {compute}{' checkpointing' if again else ''}"
                    found[name] = compared(activations(changed, 1, 1, "cpu").kept, kept_an_image(changed))
    for compute in ("fp32", "bf16"):
        words = ["model.depth=2", "model.decoder_depth=2", f"precision.compute={compute}", "train.compile=true"]
        with kernels_mode("torch"):
            recipe = load_recipe("lut_vits16", words)
            found[f"lut_vits16, 2 blocks, {compute}, compiled"] = compared(
                activations(recipe, 1, 1, "cpu").kept, kept_an_image(recipe)
            )
    return found


def small_recipe(model: str, method: str, compute: str) -> Recipe:
    """The tiny recipe or ViT-S/16's."""
    if model != "tiny":
        return load_recipe(model, [f"method.name={method}", f"precision.compute={compute}"])
    made = tiny_tree()
    made["precision"]["compute"] = compute
    made["method"] = {**made["method"], "name": method}
    return parse_recipe(made, model)


def process_peaks() -> dict[str, Any]:
    """Peaks of processes by case, each measured in its own."""
    found: dict[str, Any] = {}
    for case in PEAKS:
        command = [sys.executable, "-m", "tests.bench.peak_check", *case]
        found |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return found


def main() -> None:
    """Count everything, and print it as JSON."""
    ranks: dict[str, Any] = {}
    for world_size in WORLD_SIZES:
        with tempfile.TemporaryDirectory() as folder:
            counted = run_counting({name: tree(name, world_size) for name in CHANGES}, world_size, Path(folder))
        ranks[f"{world_size} ranks"] = {name: counted_case(name, rank) for name, rank in counted.items()}
    machine = {**describe_machine(), "command": "python -m tests.bench.plan_check"}
    report = {
        "machine": machine,
        "ranks": ranks,
        "ranks_machine": machine,
        "activations_an_image": kept_cases(),
        "process_peaks": process_peaks(),
        "process_peaks_machine": machine,
    }
    json.dump(report, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
