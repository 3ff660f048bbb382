"""How long steps stand still for a checkpoint of ViT-S/16 LUT (over 50 M parameters), asynchronous and not, on CPUs.

python benchmarks/checkpoint_cpu.py [--saves 3] [--folder DIR]     writes benchmarks/checkpoint_cpu.json

The real trainer, its state after a step, the real store on the file system of --folder. The first save of each kind also
allocates the host copies; it is given apart.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import torch

from lut_ds.config import load_recipe
from lut_ds.engine.launch import discover_ranks, process_group
from lut_ds.engine.manifest import step_folders, verify
from lut_ds.engine.saving import Saver
from lut_ds.engine.step import Trainer
from lut_ds.tracking import EventLog, read_events

OVERRIDES = [
    "train.deepspeed=cpu", "train.compile=false", "precision.compute=fp32", "precision.teacher=fp32",
    "train.global_batch=4096", "run.keep_last=1", "run.keep_every_epochs=null",
]  # fmt: skip


def measure(folder: Path, saves: int) -> dict[str, object]:
    """Seconds of each save, by kind, and what was written."""
    ranks = discover_ranks()
    found: dict[str, object] = {}
    with process_group(ranks):
        for kind in ("sync", "async"):
            recipe = load_recipe("lut_vits16", [*OVERRIDES, f"run.async_save={str(kind == 'async').lower()}"])
            trainer = Trainer(recipe, ranks, 1, 1)
            for index in range(len(trainer.shards.flats)):
                trainer.shards.moments(index)  # AdamW's state, as after the first step
            run = folder / kind
            run.mkdir(parents=True)
            events = EventLog(run / "events.jsonl")
            saver = Saver(recipe, ranks, run, 300, print, events)
            stood_still = []
            for step in range(1, saves + 2):
                begun = time.perf_counter()
                saver.save(step, trainer, {}, wait=False)
                stood_still.append(round(time.perf_counter() - begun, 3))
                saver.finish()
            saver.close()
            events.close()
            assert [verify(path) for path in step_folders(run / "checkpoints")] == [None]
            written = read_events(run / "events.jsonl")
            found[kind] = {
                "first_stand_still_s": stood_still[0],
                "stand_still_s": stood_still[1:],
                "write_and_read_back_s": [round(e["write_s"] + e["publish_s"], 3) for e in written[1:]],
            }
            found["bytes"] = written[-1]["bytes"]
            found["parameters"] = sum(shape.numel() for shape in trainer.shards.shapes.values())
            trainer.engine.destroy()
            del trainer, saver
    return found


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the system's temporary folder")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        found = measure(folder, options.saves)
    finally:
        shutil.rmtree(folder)
    report = {
        "command": f"python benchmarks/checkpoint_cpu.py --saves {options.saves}",
        "torch": torch.__version__, "machine": platform.machine(), "cores": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d", time.gmtime()), **found,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
