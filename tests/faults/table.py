"""The long fault injection: every fault for real, and benchmarks/faults.json, the table of what happened.

python -m tests.faults.table [kills1 kills2 one two] [--resumes 100]     all parts without words; parts that do not run keep their rows

kills1, kills2: a run of 1 rank continued 65 times, of 2 ranks 35 times, after SIGKILL. one, two: the other faults to a run
of 1 and of 2 ranks, one after the other; after each the run is continued. Takes about half an hour on 2 cores.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lut_ds.data.digits import write_digits
from lut_ds.engine.runfolder import package_versions
from tests.engine.launching import ROOT
from tests.faults import injections
from tests.faults.kills import kill_often
from tests.faults.namespaces import mounting_works
from tests.faults.victim import SAVE_EVERY, Victim, undisturbed

SHARES = {1: 65, 2: 35}  # per cent of the resumes
Injection = Callable[[Victim], str]
ONE: dict[str, Injection] = {
    "disk full before a save": injections.disk_full("before a save"),
    "disk full as a save begins": injections.disk_full("as a save begins"),
    "disk full before metrics are written": injections.disk_full("before metrics are written"),
    "run folder read-only": injections.read_only,
    "wandb process killed": injections.tracker_killed,
    "data folder away for 30 s": injections.data_away(30.0),
    "clock 1 hour back, then 1 day forward": injections.clock_jumps,
    "SIGTERM and SIGUSR1 in a save": injections.signals_in_a_save,
    "stop file": injections.stop_file,
    "latest, lock and ends of logs lost": injections.lost_files,
    "newest 4 checkpoints damaged: bits, length, manifest": injections.damaged_checkpoints,
    "metrics.jsonl cut before the newest checkpoint": injections.metrics_lost,
    "all checkpoints damaged": injections.all_checkpoints_damaged,
}
TWO: dict[str, Injection] = {
    "a rank stopped for 60 s": injections.rank_paused(60.0),
    "SIGTERM and SIGUSR1 in a save": injections.signals_in_a_save,
    "newest 4 checkpoints damaged: bits, length, manifest": injections.damaged_checkpoints,
}
NEEDS_MOUNTS = ("disk full", "run folder read-only")


def inject_all(folder: Path, data: Path, ranks: int, faults: dict[str, Injection]) -> list[dict[str, Any]]:
    """Inject the faults into one run, continue it after each, and compare it with an undisturbed one."""
    victim = Victim(folder / "victim", Path(shutil.copytree(data, folder / "data")), ranks)
    victim.go(6 * SAVE_EVERY)
    rows = []
    for fault, inject in faults.items():
        if fault.startswith(NEEDS_MOUNTS) and not mounting_works():
            rows.append({"fault": fault, "ranks": ranks, "outcome": "not run: mounting is not allowed here"})
            continue
        before = victim.last_step()
        outcome = inject(victim)
        victim.go((victim.last_step() // SAVE_EVERY + 2) * SAVE_EVERY)
        assert victim.damaged() == []
        assert victim.leftovers() == []
        steps = [before, victim.last_step()]
        rows.append({"fault": fault, "ranks": ranks, "outcome": outcome, "steps": steps, "continued": "bit-identical"})
        print(json.dumps(rows[-1]), flush=True)
    deviation = victim.deviation(undisturbed(folder / "undisturbed", data, ranks, victim.last_step()))
    assert deviation is None, deviation
    return rows


def kill_rows(folder: Path, data: Path, ranks: int, resumes: int) -> list[dict[str, Any]]:
    """The row of the kills: the share of all `resumes` that is for so many ranks."""
    found = kill_often(folder, data, ranks, max(1, resumes * SHARES[ranks] // 100), seed=time.time_ns() % 10**6)
    return [{"fault": "SIGKILL at random instants", **found, "continued": "bit-identical"}]


PARTS: dict[str, Callable[[Path, Path, int], list[dict[str, Any]]]] = {
    "kills1": lambda folder, data, resumes: kill_rows(folder, data, 1, resumes),
    "kills2": lambda folder, data, resumes: kill_rows(folder, data, 2, resumes),
    "one": lambda folder, data, _: inject_all(folder, data, 1, ONE),
    "two": lambda folder, data, _: inject_all(folder, data, 2, TWO),
}


def main() -> None:
    """Run parts, and put their rows into the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all without words")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "faults.json")
    parser.add_argument("--resumes", type=int, default=100, help="after kills, of both parts together")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    table = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as name:
            begun, folder = time.monotonic(), Path(name)
            rows = PARTS[part](folder, write_digits(folder / "digits", 32), options.resumes)
        table[part] = {
            "command": f"python -m tests.faults.table {part} --resumes {options.resumes}",
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.monotonic() - begun),
            "versions": package_versions(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "device": "cpu",
            "rows": rows,
        }
        options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
