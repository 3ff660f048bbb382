"""From measured times to dispatch rules: the fastest side wins, a tie goes to the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Rule = dict[str, Any]


def fastest_library(times: dict[str, float]) -> str:
    """The quickest side that is not Triton."""
    return min((side for side in times if side != "triton"), key=lambda side: times[side])


def _because(times: dict[str, float], source: str) -> str:
    ordered = sorted(times, key=lambda side: times[side])
    return "measured: " + ", ".join(f"{side} {times[side]:.1f} us" for side in ordered) + f" ({source})"


def attention_rules(measured: list[dict[str, Any]], source: str) -> list[Rule]:
    """Rules by dtype, head dim, training and length. A rule speaks for lengths above the next shorter one measured.

    Triton is taken where it beats every library call at every batch size; among library calls, the one whose worst batch
    size is least behind the best.
    """
    groups: dict[tuple[str, int, bool, int], list[dict[str, float]]] = {}
    for entry in measured:
        if entry["op"] == "attention":
            key = (entry["dtype"], entry["head_dim"], entry["training"], entry["tokens"])
            groups.setdefault(key, []).append(entry["times_us"])
    found: list[Rule] = []
    for (dtype, head_dim, training, tokens), batches in sorted(groups.items()):
        sides = [side for side in batches[0] if all(side in times for times in batches)]
        behind = {side: max(times[side] / min(times.values()) for times in batches) for side in sides}
        because = "measured, at its worst batch size behind the best: " + ", ".join(
            f"{side} {behind[side]:.2f}" for side in sorted(behind, key=lambda side: behind[side])
        )
        condition = {"dtypes": [dtype], "head_dims": [head_dim], "training": training, "up_to": tokens}
        if all(times["triton"] < times[fastest_library(times)] for times in batches):
            found.append({"use": "triton", **condition, "because": f"{because} ({source})"})
        found.append({"use": fastest_library(behind), **condition, "because": f"{because} ({source})"})
    return found


def simple_rules(op: str, measured: list[dict[str, Any]], source: str) -> list[Rule]:
    """Triton where it is the faster side at every shape measured; else torch. One rule for all shapes, then the other."""
    entries = [entry for entry in measured if entry["op"] == op]
    losses = [entry for entry in entries if entry["times_us"]["triton"] >= entry["times_us"]["torch"]]
    if not entries:
        return []
    if losses:
        worst = max(losses, key=lambda entry: entry["times_us"]["triton"] / entry["times_us"]["torch"])
        return [{"use": "torch", "because": f"{worst['name']}: {_because(worst['times_us'], source)}"}]
    closest = max(entries, key=lambda entry: entry["times_us"]["triton"] / entry["times_us"]["torch"])
    because = f"faster at {len(entries)} of {len(entries)} shapes, closest {closest['name']}: "
    return [
        {"use": "triton", "because": because + _because(closest["times_us"], source)},
        {"use": "torch", "because": "the other side"},
    ]


def without_spills(tuned: list[dict[str, Any]], arch: str, space: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The tiles that spill at no compiled shape of their head dim; `space` is the resource table of the tuning space."""
    spilling = [name for name, report in space.items() if report["spilled"] and name.startswith(f"{arch} ")]

    def spills(entry: dict[str, Any]) -> bool:
        start, end = f"{arch} {entry['kernel']} ", f" {json.dumps(entry['tile'])}"
        head = f" d={entry['head_dim']} " if entry["head_dim"] else ""
        return any(name.startswith(start) and name.endswith(end) and head in name for name in spilling)

    return [entry for entry in tuned if not spills(entry)]


def tile_rules(tuned: list[dict[str, Any]]) -> dict[str, list[Rule]]:
    """Best tile by kernel; by head dim and length for attention. `tuned`: kernel, tile, time_us, tokens, head_dim."""
    best: dict[tuple[str, int, int], dict[str, Any]] = {}
    for entry in tuned:
        key = (entry["kernel"], entry["head_dim"], entry["tokens"])
        if key not in best or entry["time_us"] < best[key]["time_us"]:
            best[key] = entry
    found: dict[str, list[Rule]] = {}
    for (kernel, head_dim, tokens), entry in sorted(best.items()):
        # fp32 keeps its own, smaller attention tiles
        narrow = {"dtypes": ["bfloat16", "float16"], "head_dims": [head_dim], "up_to": tokens}
        condition = narrow if tokens else {}
        found.setdefault(kernel, []).append({**condition, "tile": entry["tile"]})
    return found


def updated(
    table: dict[str, Any], arch: str, measured: list[dict[str, Any]], tuned: list[dict[str, Any]], source: str
) -> dict[str, Any]:
    """The table with this architecture's measured rules in front of what spoke for it before."""
    new: dict[str, Any] = json.loads(json.dumps(table))
    default = new["choices"]["default"]
    choices = new["choices"].setdefault(arch, {})
    for op in default:
        before = [rule for rule in choices.get(op, default[op]) if not rule["because"].startswith("measured")]
        if op == "attention":
            choices[op] = attention_rules(measured, source) + before
        else:
            choices[op] = simple_rules(op, measured, source) or before
    tiles = new["tiles"].setdefault(arch, {})
    for kernel, rules in tile_rules(tuned).items():
        # shapes nobody measured keep the default tiles
        tiles[kernel] = rules + (new["tiles"]["default"][kernel] if "head_dims" in rules[0] else [])
    return new


def write(table: dict[str, Any], path: Path) -> None:
    """One rule a line, so that a new measurement is a readable diff."""
    lines = ["{"]
    for section, by_arch in table.items():
        lines.append(f"  {json.dumps(section)}: {{")
        for arch, by_op in by_arch.items():
            lines.append(f"    {json.dumps(arch)}: {{")
            for op, rules in by_op.items():
                lines.append(f"      {json.dumps(op)}: [")
                lines += [f"        {json.dumps(rule)}," for rule in rules]
                lines[-1] = lines[-1].removesuffix(",")
                lines.append("      ],")
            lines[-1] = lines[-1].removesuffix(",")
            lines.append("    },")
        lines[-1] = lines[-1].removesuffix(",")
        lines.append("  },")
    lines[-1] = lines[-1].removesuffix(",")
    path.write_text("\n".join([*lines, "}"]) + "\n")
