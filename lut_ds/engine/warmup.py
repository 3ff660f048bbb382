"""Checks on an allocation before its first step: do the ranks run the same software on the same data, and how fast do they talk?

What would make a run wrong is refused and names the host: other versions, code, recipe or images on one of them. What makes
it slow or fragile is a warning: a slow link, another device, a clock that is off, little shared memory.
"""

import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lut_ds.config import RunRecipe
from lut_ds.data.sources import Source
from lut_ds.engine.codedigest import own_digests, package_digest
from lut_ds.engine.launch import Ranks, discover_ranks, process_group
from lut_ds.engine.runfolder import git_state, package_versions
from lut_ds.errors import RunFault, UserError

GIB = 2**30
MIN_SHARED_MEMORY = GIB
MAX_SKEW = 1.0  # seconds
SLOW_LINK = 3.0  # times slower than the median of its kind
MESSAGE = {
    "cuda": 64 << 20,
    "cpu": 1 << 20,
}  # bytes: large enough to be limited by bandwidth, small enough for a second
SECONDS = {"cuda": 0.5, "cpu": 0.1}  # for each of the two measurements
MAX_ROUNDS = 20
SAMPLES = 4  # images that each rank tries to read

Facts = dict[str, Any]


def check_allocation(ranks: Ranks, recipe: RunRecipe | None = None, source: Source | None = None) -> dict[str, Any]:
    """Compare the ranks and measure their links; the process group exists. All ranks call this together.

    Args:
        ranks: this process's place.
        recipe: compared by its values; None compares machines only.
        source: the images, compared by their number; each rank tries to read a few.

    Returns:
        JSON values, the same on every rank but for its clock: hosts, devices, `clock_skew_s`, `all_reduce` and `links`
        (GB/s, 10^9 bytes), the smallest free shared memory, `seconds` that this took, and `warnings`, a line each.

    Raises:
        UserError: ranks that would not train the same run, or data that one of them cannot read; the same on every rank.
    """
    started = time.monotonic()
    skew = _clock_skew(ranks)
    facts: list[Facts] = [{}] * ranks.world_size
    dist.all_gather_object(facts, _facts(ranks, recipe, source))
    refuse_differences(facts)
    reduced, links = _all_reduce_speed(ranks), _link_speeds(ranks, facts)
    report = {
        "hosts": list(dict.fromkeys(fact["host"] for fact in facts)),
        "ranks": ranks.world_size,
        "devices": sorted({fact["device"] for fact in facts}),
        "images": facts[0]["images"],
        "clock_skew_s": round(max(skew) - min(skew), 4),
        "all_reduce": reduced,
        "links": links,
        "shared_memory_free_gib": round(min(fact["shared_memory"] for fact in facts) / GIB, 2),
    }
    report["warnings"] = [
        *device_warnings(facts),
        *clock_warnings(facts, skew),
        *memory_warnings(facts),
        *link_warnings(facts, links),
    ]
    report["seconds"] = round(time.monotonic() - started, 3)
    return report


def _facts(ranks: Ranks, recipe: RunRecipe | None, source: Source | None) -> Facts:
    """What this rank tells the others. `same` must agree among ranks; `problem` is why its data cannot be read."""
    cuda = ranks.device.type == "cuda"
    versions = {"python": platform.python_version(), **package_versions(), "CUDA": torch.version.cuda}
    if cuda:
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    git = git_state(Path(__file__).parent)
    values = json.loads(recipe.model_dump_json()) if recipe is not None else {}
    return {
        "rank": ranks.rank,
        "host": platform.node(),
        "device": torch.cuda.get_device_name(ranks.device) if cuda else "cpu",
        "same": {
            "version": versions,
            "lut_ds": {"commit": git["commit"] if git else None, "code": package_digest()},
            "recipe": {f"{section}.{key}": value for section in values for key, value in values[section].items()},
            "file": own_digests(values),
        },
        "images": len(source) if source is not None else None,
        "problem": _read_problem(ranks, source) if source is not None and len(source) > 0 else None,
        "shared_memory": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
    }


def _read_problem(ranks: Ranks, source: Source) -> str | None:
    """Why this rank can read none of a few images, each rank others; a single bad file is not this check's business."""
    problem = None
    for number in range(SAMPLES):
        index = (ranks.rank * SAMPLES + number) * len(source) // (ranks.world_size * SAMPLES)
        try:
            if source.read(index):
                return None
            problem = f"image {index} is empty"
        except (OSError, RunFault, UserError) as error:
            problem = str(error)
    return problem


def _who(fact: Facts) -> str:
    return f"rank {fact['rank']} ({fact['host']})"


def refuse_differences(facts: list[Facts]) -> None:
    """Refuse ranks that would not train the same run; names the first rank that differs from rank 0, and in what.

    Raises:
        UserError: another version, code, recipe value or number of images, or an image that cannot be read.
    """
    first = facts[0]
    for fact in facts[1:]:
        for kind, wanted in first["same"].items():
            found = fact["same"][kind]
            key = next((k for k in {**wanted, **found} if wanted.get(k) != found.get(k)), None)
            if key is not None:
                raise UserError(
                    f"cluster: {kind} {key} differs: {wanted.get(key)} on {_who(first)}, {found.get(key)} on {_who(fact)}; give all "
                    "nodes the same environment, code and recipe"
                )
        if fact["images"] != first["images"]:
            raise UserError(
                f"data.path: {_who(first)} finds {first['images']} images and {_who(fact)} {fact['images']}; give all nodes the "
                "same folder"
            )
    for fact in facts:
        if fact["problem"]:
            raise UserError(f"data.path: {_who(fact)} cannot read: {fact['problem']}; see that its node has the data")


def device_warnings(facts: list[Facts]) -> list[str]:
    """Ranks on another device than rank 0: they set the pace, or wait."""
    usual = facts[0]["device"]
    return [
        f"{_who(f)} has a {f['device']}, rank 0 a {usual}: the slower sets the pace"
        for f in facts
        if f["device"] != usual
    ]


def clock_warnings(facts: list[Facts], skew: list[float]) -> list[str]:
    """Hosts whose clock is off from the ranks' median: their logs and time limits will be too."""
    hosts = {f["host"]: seconds for f, seconds in zip(facts, skew, strict=True)}
    return [
        f"the clock of {host} is {seconds:+.1f} s off: set it by NTP"
        for host, seconds in hosts.items()
        if abs(seconds) > MAX_SKEW
    ]


def memory_warnings(facts: list[Facts]) -> list[str]:
    """Hosts with little free shared memory, through which NCCL's ranks of one node talk."""
    hosts = {f["host"]: f["shared_memory"] for f in facts if f["device"] != "cpu"}
    return [
        f"{host} has {free / GIB:.2f} GiB of /dev/shm free: NCCL needs it; clear it, or give the container more (--shm-size=8g)"
        for host, free in hosts.items()
        if free < MIN_SHARED_MEMORY
    ]


def link_warnings(facts: list[Facts], links: list[dict[str, Any]]) -> list[str]:
    """Links several times slower than the median of their kind (within a node, between nodes); two say nothing yet."""
    warnings = []
    for kind in ("within", "between"):
        speeds = [link["gb_per_s"] for link in links if link["kind"] == kind]
        if len(speeds) < 3:
            continue
        usual = statistics.median(speeds)
        for link in links:
            if link["kind"] == kind and link["gb_per_s"] * SLOW_LINK < usual:
                pair = f"{_who(facts[link['from']])} to {_who(facts[link['to']])}"
                warnings.append(
                    f"slow link: {pair} moves {link['gb_per_s']:.3g} GB/s, the median {kind} nodes is {usual:.3g}: the run goes at "
                    "its pace; leave the node out (sbatch --exclude)"
                )
    return warnings


def _clock_skew(ranks: Ranks) -> list[float]:
    """Each rank's clock against the median of all, s: read as the ranks leave a barrier, the closest of three rounds."""
    best: list[float] = []
    for _ in range(3):
        dist.barrier()
        clocks: list[float] = [0.0] * ranks.world_size
        dist.all_gather_object(clocks, time.time())
        middle = statistics.median(clocks)
        offsets = [clock - middle for clock in clocks]
        if not best or max(map(abs, offsets)) < max(map(abs, best)):
            best = offsets
    return best


def _all_reduce_speed(ranks: Ranks) -> dict[str, float]:
    """Bus bandwidth of an all-reduce over all ranks, as NCCL's tests count it: 2 (n-1)/n of the bytes, over the time."""
    size = MESSAGE[ranks.device.type]
    buffer = torch.zeros(size, dtype=torch.uint8, device=ranks.device)
    seconds = _fastest(ranks, lambda: dist.all_reduce(buffer))
    moved = 2 * (ranks.world_size - 1) / ranks.world_size * size
    return {"mib": size / 2**20, "ms": round(seconds * 1e3, 3), "bus_gb_per_s": round(moved / seconds / 1e9, 3)}


def _link_speeds(ranks: Ranks, facts: list[Facts]) -> list[dict[str, Any]]:
    """A ring, every rank sending to the next at once: what each link moves, GB/s. An all-reduce shows only the slowest."""
    size, rank, world = MESSAGE[ranks.device.type], ranks.rank, ranks.world_size
    outgoing = torch.zeros(size, dtype=torch.uint8, device=ranks.device)
    incoming = torch.empty_like(outgoing)

    def exchange() -> None:
        operations = [
            dist.P2POp(dist.isend, outgoing, (rank + 1) % world),
            dist.P2POp(dist.irecv, incoming, (rank - 1) % world),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    seconds: list[float] = [0.0] * world
    dist.all_gather_object(seconds, _fastest(ranks, exchange))
    links = []
    for to, taken in enumerate(seconds):
        source = (to - 1) % world
        kind = "within" if facts[source]["host"] == facts[to]["host"] else "between"
        links.append({"from": source, "to": to, "kind": kind, "gb_per_s": round(size / taken / 1e9, 3)})
    return links


def _fastest(ranks: Ranks, action: Callable[[], Any]) -> float:
    """Shortest time of a collective on this rank, s, over as many rounds as fit in SECONDS; the first one connects."""

    def timed() -> float:
        dist.barrier()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        action()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    timed()
    probe = timed()
    slowest = torch.tensor([probe], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)  # all ranks go the same number of rounds
    rounds = min(MAX_ROUNDS, int(SECONDS[ranks.device.type] / slowest.item()))
    return min([probe, *(timed() for _ in range(rounds))])


def describe_cluster(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    if report["ranks"] == 1:
        return "1 rank: nothing to compare; start this with srun or torchrun on the allocation"
    reduced, speeds = report["all_reduce"], [link["gb_per_s"] for link in report["links"]]
    lines = [
        f"cluster: {report['ranks']} ranks on {len(report['hosts'])} host(s), {', '.join(report['devices'])}",
        f"  all-reduce  {reduced['mib']:.0f} MiB in {reduced['ms']:.2f} ms, {reduced['bus_gb_per_s']:.2f} GB/s",
        f"  links       {min(speeds):.2f} to {max(speeds):.2f} GB/s from each rank to the next",
        f"  clocks      within {report['clock_skew_s'] * 1e3:.1f} ms",
        f"  /dev/shm    {report['shared_memory_free_gib']:.1f} GiB free at least",
        *(f"  warning     {warning}" for warning in report["warnings"]),
    ]
    return "\n".join(lines)


def examine_cluster() -> dict[str, Any]:
    """`lut-ds doctor --cluster`: the checks without a recipe, on the ranks that a launcher started.

    Raises:
        UserError: see `check_allocation`.
    """
    ranks = discover_ranks()
    with process_group(ranks):
        return check_allocation(ranks) if ranks.world_size > 1 else {"ranks": 1, "warnings": []}
