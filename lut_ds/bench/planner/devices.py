"""GPUs that a plan knows: what their data sheets say, and what is assumed about them until it has been measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: as torch's device name contains it.
        memory_gib: what torch can allocate of it.
        peak: dense bf16 FLOP/s; peak_fp32: of fp32 products (tf32 is off in fp32 recipes).
        memory_rate: bytes/s of its memory.
        link: bytes/s each way to the other GPUs of the node (NVLink).
        net: Gbit/s each way of a GPU's share of the network between nodes, of the maker's own systems.
        mfu: assumed utilisation by ViT-L and wider in bf16: low, expected.
    """

    name: str
    memory_gib: float
    peak: float
    peak_fp32: float
    memory_rate: float
    link: float
    net: float
    mfu: tuple[float, float]
    fp8: bool = True


# MFU from published anchors: NeMo ViT g/14 44 % on A100, 27-29 % on H100; torchtitan 33-39 % on H100.
DEVICES = {
    "a100-40": Device("A100", 39.4, 312e12, 19.5e12, 1.555e12, 300e9, 200, (0.35, 0.44), fp8=False),
    "a100-80": Device("A100", 79.2, 312e12, 19.5e12, 2.039e12, 300e9, 200, (0.35, 0.44), fp8=False),
    "h100": Device("H100", 79.1, 989e12, 67e12, 3.35e12, 450e9, 400, (0.27, 0.35)),
    "h200": Device("H200", 139.0, 989e12, 67e12, 4.8e12, 450e9, 400, (0.27, 0.35)),
}
NARROW = ((512, 0.6), (768, 0.8))  # encoders up to this width, and the share of that MFU that is assumed of them

FRAMEWORK_GIB = 3.0  # CUDA context, libraries' workspaces, NCCL's channels, the decoder of images
RESERVE = 0.08  # of the device, for fragmentation and what is not counted
LINK_EFFICIENCY = 0.8
OVERLAP = 0.7  # of the time that computes while an exchange may run
MEMORY_EFFICIENCY = 0.8
UNCOMPILED = 1.16  # time of blocks that are not compiled (torchtitan: compiling gives 16 %)
LATENCY_NODE = 20e-6  # s, of a collective within a node
LATENCY_HOP = 15e-6  # s more for each doubling of the nodes
LAUNCH = 5e-6  # s of the host for a kernel
KERNELS = {
    "student": 40,
    "teacher": 12,
    "other": 150,
}  # a block forward and backward; a teacher's block; beside the blocks
LOADER_CPU_MS = 3.63  # CPU time an image (benchmarks/loader_cpu.json: two views of 500x375 JPEGs, Zen 5)


def assumed_mfu(device: Device, width: int) -> tuple[float, float]:
    """Low and expected utilisation for an encoder of this width."""
    share = next((share for up_to, share in NARROW if width <= up_to), 1.0)
    return device.mfu[0] * share, device.mfu[1] * share


def usable_bytes(device: Device) -> float:
    """What the run's own tensors may take."""
    return (device.memory_gib * (1 - RESERVE) - FRAMEWORK_GIB) * 2**30
