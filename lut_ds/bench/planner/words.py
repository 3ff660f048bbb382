"""A plan for people."""

from typing import Any


def describe(planned: dict[str, Any]) -> str:
    """What `plan_run` returns, as lines."""
    return "\n".join(
        [
            *_head(planned),
            *_stages(planned),
            *_traffic(planned),
            *_scaling(planned),
            "assumptions",
            *(f"  {topic:11} {text}" for topic, text in planned["assumptions"].items()),
        ]
    )


def _head(planned: dict[str, Any]) -> list[str]:
    chosen, expected, low = planned["chosen"], planned["expected"], planned["low"]
    parts = expected["parts_s"]
    times = ", ".join(f"{name} {s * 1e3:.1f}" for name, s in parts.items() if s > 5e-5 and name != "hidden")
    loader, target, written = planned["loader"], planned["weak_scaling_target"], planned["as_written"]
    cores = loader["cpu_cores_a_node_without_gpu_decoding"]
    fits = f"{written['memory_gib']:.1f} GiB" if "memory_gib" in written else written["why"]
    verdict = "reached" if target["reached"] else "missed"
    return [
        f"plan of {planned['recipe']} on {planned['gpus']} x {planned['gpu']}, {planned['nodes']} node(s)",
        f"  run as      {chosen['overrides']}  (accumulation {chosen['accumulation']})",
        f"  written as  ZeRO {written['zero_stage']}, micro-batch {written['micro_batch']}: "
        f"{'fits' if written['fits'] else 'does not fit'}, {fits}",
        f"  step        {expected['step_s'] * 1e3:.1f} ms ({times}); {expected['images_per_s']:,.0f} images/s, MFU "
        f"{expected['mfu']:.1%}; with the low efficiency {low['step_s'] * 1e3:.1f} ms, {low['images_per_s']:,.0f} images/s",
        f"  run         {planned['steps']:,} steps, {expected['hours']:,.1f} h, {expected['gpu_hours']:,.0f} GPU-hours; low: "
        f"{low['hours']:,.1f} h, {low['gpu_hours']:,.0f} GPU-hours",
        f"  limit       {planned['limit']}",
        f"  loader      must give {loader['images_per_s_a_node']:,.0f} images/s a node; {cores:,.0f} cores where CPUs decode at "
        f"{loader['cpu_ms_an_image']:g} ms an image (GPU decoding is not measured)",
        f"  target      {target['wanted']:.0%} weak scaling on {target['gpus']} GPUs: {verdict}, {target['predicted']:.1%}; not "
        f"hidden {target['not_hidden']}",
    ]


def _stages(planned: dict[str, Any]) -> list[str]:
    micro = planned["chosen"]["micro_batch"]
    head = f"memory, GiB of a rank at micro-batch {micro} ({planned['usable_gib']:.1f} may be taken)"
    lines = [f"{head:66} total  largest micro-batch"]
    for stage, ways in planned["stages"].items():
        for key, way in ways.items():
            parts = dict(way["memory_gib"])
            total = parts.pop("total")
            shown = ", ".join(f"{part} {size:.2f}" for part, size in parts.items() if size >= 0.005)
            label = f"ZeRO {stage}" + (", checkpointing" if key == "checkpointing" else "")
            largest = way["largest_micro_batch"] or "none"
            allowed = f"{largest!s:>6} (memory: {way['memory_allows_micro_batch']})"
            lines.append(f"  {label:22} {total:7.2f}{' ' if way['fits'] else '!'} {allowed:22} {shown}")
    return lines


def _traffic(planned: dict[str, Any]) -> list[str]:
    lines = [f"traffic, MB that leave a rank in a step: {planned['traffic']['wire_bytes'] / 1e6:,.1f}"]
    for kind, c in planned["traffic"]["kinds"].items():
        lines.append(
            f"  {kind:16} {c['operation']:15} {c['wire_bytes'] / 1e6:12,.3f} MB, {c['calls']:5,.0f} calls, "
            f"{c['exposed_s'] * 1e3:7.2f} ms not hidden"
        )
    return lines


def _scaling(planned: dict[str, Any]) -> list[str]:
    strong = {row["gpus"]: row for row in planned["scaling"]["strong"]}
    lines = [
        f"{'scaling':>9} {'weak images/s':>14} {'eff.':>6} {'strong images/s':>16} {'eff.':>6}  limit: weak, strong"
    ]
    for row in planned["scaling"]["weak"]:
        other = strong[row["gpus"]]
        found = (
            f"{other['why_not']:>23}"
            if "why_not" in other
            else f"{other['images_per_s']:16,.0f} {other['efficiency']:6.1%}"
        )
        limit = ", ".join(dict.fromkeys([row["limit"], other.get("limit", row["limit"])]))
        lines.append(f"{row['gpus']:9,} {row['images_per_s']:14,.0f} {row['efficiency']:6.1%} {found}  {limit}")
    return lines
