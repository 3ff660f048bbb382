"""What a plan takes for granted, in words with their numbers: a prediction is worth what these are."""

from lut_ds.bench.planner import devices as d
from lut_ds.bench.planner.fit import Way
from lut_ds.bench.planner.measured import Measured
from lut_ds.bench.planner.timing import Cluster
from lut_ds.config import Recipe


def assumptions(
    recipe: Recipe, way: Way, cluster: Cluster, measured: Measured | None, mfu: tuple[float, float], images: int
) -> dict[str, str]:
    """Every assumption by topic; `images`: of the training set."""
    device, zero = cluster.device, way.config.get("zero_optimization", {})
    peak = device.peak if recipe.precision.compute == "bf16" else device.peak_fp32
    found = {
        "efficiency": _efficiency(recipe, device, measured, mfu, peak),
        "compiler": (
            f"blocks that are not compiled take {d.UNCOMPILED:g} times as long: all with train.compile=false, the student's with "
            "ZeRO-3 (torchtitan: compiling gives 16 %)"
        ),
        "overlap": (
            f"gradients and ZeRO-3's fetches hide behind at most {d.OVERLAP:.0%} of the computation they run beside, the last "
            "bucket of a backward pass behind none; weights, teacher refresh, batch norm and guards hide behind none"
        ),
        "network": (
            f"{cluster.net:g} Gbit/s each way a GPU between nodes of {cluster.node}, {device.link / 1e9:g} GB/s within a node, "
            f"{d.LINK_EFFICIENCY:.0%} of either achieved by one ring over all ranks and all adapters of a node"
        ),
        "latency": (
            f"{d.LATENCY_NODE * 1e6:g} us a collective, {d.LATENCY_HOP * 1e6:g} us more for each doubling of the nodes; "
            "no jitter, no slow rank, no other traffic"
        ),
        "memory": (
            f"of {device.memory_gib:g} GiB {d.RESERVE:.0%} stay free for fragmentation and {d.FRAMEWORK_GIB:g} GiB go to CUDA, NCCL, "
            "libraries and the decoder; the gradients' temporaries in a backward pass are estimated"
        ),
        "activations": (
            "fused attention and loss kernels; checked against what autograd keeps on a CPU, where compiled blocks keep as much as "
            "others, and not on a GPU"
        ),
        "teacher": "fp8 products are counted at the rate of bf16, fp32 beside a bf16 student at half of it (TF32)",
        "host": (
            f"{d.LAUNCH * 1e6:g} us a kernel: {d.KERNELS['student']} for a block that is trained, {d.KERNELS['teacher']} for the "
            f"teacher's, {d.KERNELS['other']} beside the blocks; a step waits for the host where its kernels are shorter"
        ),
        "optimizer": f"AdamW and EMA at {d.MEMORY_EFFICIENCY:.0%} of {device.memory_rate / 1e12:g} TB/s, hidden behind nothing",
        "scaling": (
            "efficiency is images/s a GPU over the most that any number of GPUs up to it gives: where ZeRO shards the optimizer, "
            "a lone GPU, which updates all of it, is not the fastest; whether the states fit on fewer is not asked of weak scaling"
        ),
        "data": (
            f"{images:,} images, an epoch's last incomplete batch dropped; the loader keeps up, saves cost nothing, no restart; "
            "compilation and start-up are not counted"
        ),
    }
    if int(zero.get("zero_hpz_partition_size", 1)) > 1 or any(zero.get(key) for key in zero if "quantized" in key):
        found["ZeRO++"] = "not modelled: memory and traffic are those of plain ZeRO-3"
    return found


def _efficiency(
    recipe: Recipe, device: d.Device, measured: Measured | None, mfu: tuple[float, float], peak: float
) -> str:
    if measured is None:
        return (
            f"ASSUMED, no GPU was measured: MFU {mfu[1]:.0%} expected, {mfu[0]:.0%} low, of {peak / 1e12:g} TFLOP/s in forward and "
            f"backward passes of an encoder {recipe.model.width} wide (published: NeMo ViT g/14 44 % on A100, 27-29 % on H100; "
            "torchtitan 33-39 % on H100; narrower models are assumed slower)"
        )
    kind = "this model" if measured.exact else "another size, its MFU taken over"
    return (
        f"measured, {kind}: {measured.what}: MFU {measured.mfu[1]:.1%}, {measured.mfu[0]:.1%} in the slowest round, of "
        f"{peak / 1e12:g} TFLOP/s; the optimizer of a lone GPU is in it and is counted again"
    )
