"""Which weights ZeRO-3 gathers in a micro-batch and how many it holds, without running it.

Replays the order in which DeepSpeed 0.19.8 fetches, prefetches and releases parameters once it has seen a step:
prefetching runs ahead by `stage3_prefetch_bucket_size`, and a parameter that is used again within
`stage3_max_reuse_distance`, or whose next use the prefetcher has already passed, is not released in between.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lut_ds.method.lut import LUT, MAE


@dataclass(frozen=True)
class Fetched:
    """Elements of the weights that are sharded (small ones stay whole).

    Attributes:
        gathered: gathered in a micro-batch, over forward and backward pass; a weight may count several times.
        live: the most that are whole at any one time.
    """

    gathered: int
    live: int


UNCALLED = {"q_norm", "k_norm", "attn_drop", "pos_drop", "patch_drop", "norm_pre", "fc_norm", "head_drop", "head"}
Event = tuple[nn.Module, bool]  # a module, and whether it begins (or ends)


def fetched(student: MAE, zero: Mapping[str, Any], checkpointing: bool) -> Fetched:
    """What one micro-batch fetches; `student` may be on the meta device; `zero`: the section zero_optimization."""
    return _Replay(student, zero, list(_micro_batch(student, checkpointing))).run()


def persistent(numel: int, zero: Mapping[str, Any]) -> bool:
    """Whether a parameter of this size stays whole on every rank."""
    return numel <= int(zero.get("stage3_param_persistence_threshold", 100_000))


def _micro_batch(student: MAE, checkpointing: bool) -> Iterator[Event]:
    parts: list[nn.Module] = [student.encoder, student.decoder]
    if isinstance(student, LUT):
        parts += [student.projector, student.predictor] * student.views
    for part in parts:
        yield from _pass(part, backward=False, checkpointing=False)
    for part in reversed(parts):
        yield from _pass(part, backward=True, checkpointing=checkpointing)


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The children that a forward pass calls: blocks one by one, and not what timm keeps for other uses."""
    for name, child in module.named_children():
        if name == "blocks":
            yield from child.children()
        elif name not in UNCALLED:
            yield child


def _pass(module: nn.Module, *, backward: bool, checkpointing: bool) -> Iterator[Event]:
    yield module, True  # without weights of its own too: every module lets the prefetcher run on
    if backward and checkpointing and type(module).__name__ == "Block":
        yield from _recomputed(module)
    children = list(_called(module))
    for child in reversed(children) if backward else children:
        yield from _pass(child, backward=backward, checkpointing=checkpointing)
    yield module, False


def _recomputed(block: nn.Module) -> Iterator[Event]:
    """A block's second forward pass, which stops inside its last weights: what they need is there by then."""
    events = list(_pass(block, backward=False, checkpointing=False))
    last = max(i for i, (module, begins) in enumerate(events) if begins and [*module.parameters(recurse=False)])
    yield from events[: last + 1]


@dataclass
class _Replay:
    student: nn.Module
    zero: Mapping[str, Any]
    events: list[Event]
    gathered: int = 0
    peak: int = 0
    whole: int = 0
    step: int = 0
    live: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        zero = self.zero
        self.bucket = int(zero.get("stage3_prefetch_bucket_size", 50_000_000))
        self.reuse = int(zero.get("stage3_max_reuse_distance", 1_000_000_000))
        self.most = int(zero.get("stage3_max_live_parameters", 1_000_000_000))
        self.trace = [self._own(module) for module, begins in self.events if begins]
        self.queue = deque((key, step) for step, own in enumerate(self.trace) for key in own)
        self.sizes = {key: numel for own in self.trace for key, numel in own.items()}
        self.seen: dict[int, int] = defaultdict(lambda: -1)
        self.next_use: dict[int, list[int]] = defaultdict(list)
        for step, own in enumerate(self.trace):
            for key in own:
                self.next_use[key].append(step)
        # Elements of the modules before each step of the trace, for distances.
        self.passed = [0]
        for own in self.trace:
            self.passed.append(self.passed[-1] + sum(own.values()))

    def _own(self, module: nn.Module) -> dict[int, int]:
        return {id(p): p.numel() for p in module.parameters(recurse=False)}

    def run(self) -> Fetched:
        for module, begins in self.events:
            if begins:
                self._fetch(self.trace[self.step])
            else:
                self._release(self._own(module))
        return Fetched(self.gathered, self.peak)

    def _gather(self, key: int, numel: int) -> int:
        if key in self.live or persistent(numel, self.zero):
            return 0
        self.live[key] = numel
        self.gathered += numel
        self.whole += numel
        self.peak = max(self.peak, self.whole)
        return numel

    def _fetch(self, own: dict[int, int]) -> None:
        for key, numel in own.items():
            self._gather(key, numel)
        waiting = sum(self.seen[key] < self.step for key in own)
        for _ in range(min(waiting, len(self.queue))):
            key, used = self.queue.popleft()
            self.seen[key] = used
        room = min(self.most - self.whole, self.bucket)
        ahead = 0
        while self.bucket > 0 and self.queue and ahead < room:
            key, used = self.queue.popleft()
            self.seen[key] = max(self.seen[key], used)
            ahead += self._gather(key, self.sizes[key])
        self.step += 1

    def _release(self, own: dict[int, int]) -> None:
        for key in own:
            again = next((use for use in self.next_use[key] if use >= self.step), None)
            near = again is not None and self.passed[again] - self.passed[self.step] < self.reuse
            if self.seen[key] <= self.step and not near:
                self.whole -= self.live.pop(key, 0)
