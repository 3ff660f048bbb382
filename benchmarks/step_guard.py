"""Report whether the training step costs more CPU time than when `step_guard.json` was committed: beside a plain one.

Run: python benchmarks/step_guard.py [--write]       (half a minute; exit code 1 below 0.6 of a committed ratio)
"""

import argparse
import json
import sys
from pathlib import Path

from lut_ds.bench.step_guard import judge, measure_ratios

COMMITTED = Path(__file__).with_suffix(".json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write what is measured into step_guard.json")
    parser.add_argument("--pairs", type=int, default=5, help="steps of each side")
    args = parser.parse_args()
    found = measure_ratios(args.pairs)
    found["machine"]["command"] = "python benchmarks/step_guard.py --write"
    if args.write:
        COMMITTED.write_text(json.dumps(found, indent=1) + "\n")
    lines, bad = judge(found, json.loads(COMMITTED.read_text()))
    print("\n".join(lines))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
