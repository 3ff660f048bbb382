"""Runs `lut-ds pretrain` once for each shipped recipe and writes the results; imports, the slow part, happen once.

python recipes_worker.py DATA OUT_FOLDER section.key=value ...
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import deepspeed  # noqa: F401 - slow to import, so before the processes part

import lut_ds.data.loader
import lut_ds.engine.train  # noqa: F401
from lut_ds.cli import main
from lut_ds.config import shipped_recipes


def run(name: str, data: str, out: str, overrides: list[str]) -> None:
    """One recipe with both streams in files; exits with the command's code."""
    for stream, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{out}/{name}.{stream}", os.O_CREAT | os.O_WRONLY), descriptor)
    sys.exit(main(["pretrain", name, "--json", f"data.path={data}", f"run.dir={out}/{name}", *overrides]))


if __name__ == "__main__":
    data, out, *overrides = sys.argv[1:]
    fork = multiprocessing.get_context("fork")
    names, codes = shipped_recipes(), {}
    for pair in zip(names[::2], [*names[1::2], None]):
        processes = {n: fork.Process(target=run, args=(n, data, out, overrides)) for n in pair if n is not None}
        for process in processes.values():
            process.start()
        for name, process in processes.items():
            process.join()
            codes[name] = process.exitcode
    Path(out, "codes.json").write_text(json.dumps(codes))
