"""What a step must not do: wait for the device in its middle, compile again, or gather weights that nobody asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lut_kernels.checks
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lut_ds.config import load_recipe, parse_recipe
from lut_ds.engine import hostmemory
from lut_ds.engine.hostmemory import check_host_memory, keep_freed_memory
from lut_ds.engine.launch import Ranks, discover_ranks, process_group
from lut_ds.engine.step import Trainer, pretraining
from lut_ds.errors import UserError
from tests.engine.tiny import pixels, tiny_tree

# What reads a value on the host, or needs one to know the shape of a result: on a GPU the host waits there.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::item",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
}


@dataclass
class Batch:
    views: list[Tensor]
    noise: Tensor
    draws: Tensor | None = None


class NoWaiting(TorchDispatchMode):
    """Inside, an operator for which the host would wait is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in WAITS or (func.name().startswith("aten::index.Tensor") and _by_mask(args)):
            raise AssertionError(f"the host would wait: {func.name()}")
        return func(*args, **(kwargs or {}))


class NoConstants(TorchFunctionMode):
    """Inside, a tensor made of numbers is an error: on a GPU the host waits until they are copied to the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and not isinstance(args[-1], Tensor):
            raise AssertionError(f"the host would wait: {func.__name__}")
        return func(*args, **(kwargs or {}))


def _by_mask(args: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """A lone rank's process group."""
    found = discover_ranks()
    with process_group(found):
        yield found


def trainer_of(ranks: Ranks, stage: str, precision: tuple[str, str], **train: Any) -> Trainer:
    tree = tiny_tree(deepspeed=stage, micro_batch=8, **train)
    tree["precision"] = dict(zip(("compute", "teacher"), precision, strict=True))
    tree["guard"] = {"spike": "skip", "spike_window": 8}
    return Trainer(parse_recipe(tree, "tiny"), ranks, 8, 2)


def batches(trainer: Trainer, ranks: Ranks, step: int) -> list[Batch]:
    """Two micro-batches of 8 images on the device."""
    first, second, noise = (t.to(ranks.device) for t in pixels(parse_recipe(tiny_tree(), "tiny"), step))
    return [Batch([first[part], second[part]], noise[part]) for part in (slice(0, 8), slice(8, 16))]


CASES = [("zero1", ("bf16", "bf16")), ("zero2", ("bf16", "fp8"))]


@pytest.mark.parametrize("stage, precision", CASES)
def test_no_operator_of_a_step_waits_for_the_device(
    ranks: Ranks, stage: str, precision: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The operators look at values on a CPU only; here they do as on a GPU.
    monkeypatch.setattr(lut_kernels.checks, "_readable", lambda tensor: False)
    trainer = trainer_of(ranks, stage, precision)
    inputs = [batches(trainer, ranks, step) for step in range(3)]
    trainer.update(inputs[0], 1e-3, 0.9)  # the first step makes the optimizer's state
    for name in ("cpu", "numpy", "tolist"):
        monkeypatch.setattr(Tensor, name, lambda *_, name=name: pytest.fail(f"the host would wait: {name}()"))
    with NoWaiting(), NoConstants():
        results = [trainer.update(step, 1e-3, 0.9) for step in inputs[1:]]
    monkeypatch.undo()
    assert all(torch.isfinite(result[:5]).all() for result in results)
    trainer.engine.destroy()


def test_the_check_finds_what_waits() -> None:
    x = torch.rand(4)
    for wait in (
        lambda: x[0].item(),
        lambda: bool(x[0] > 2),
        lambda: x.nonzero(),
        lambda: x[x > 0.5],
        lambda: float(x[1]),
        lambda: torch.tensor(1.0, device=x.device),
        lambda: x.new_tensor([1.0]),
        lambda: torch.as_tensor([1.0], device=x.device),
    ):
        with pytest.raises(AssertionError, match="the host would wait"), NoWaiting(), NoConstants():
            wait()


def test_a_teacher_beside_the_student_changes_nothing(ranks: Ranks) -> None:
    """On a CPU the switch does nothing; on a GPU the teacher's stream must be waited for at both ends."""
    curves = []
    for beside in (False, True):
        trainer = trainer_of(ranks, "zero1", ("bf16", "bf16"), overlap_teacher=beside)
        steps = [trainer.update(batches(trainer, ranks, step), 1e-3, 0.9) for step in range(3)]
        curves.append(torch.stack([step[:4] for step in steps]).cpu())
        trainer.engine.destroy()
    torch.testing.assert_close(curves[0], curves[1], rtol=0 if ranks.device.type == "cpu" else 1e-2, atol=0)


class Stream:
    """Stands for a CUDA stream on a CPU, where work is done when it is queued: notes which streams it waited for."""

    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_the_exchange_of_gradients_orders_streams_and_holds_no_host(
    ranks: Ranks, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed takes the paths of a GPU; torch's own check on GPUs does not see a wait for the whole device."""
    curves, held = [], []
    for asynchronous in (False, True):
        monkeypatch.setattr("lut_ds.engine.ds_config.overlaps", lambda *_: True)  # as on several ranks
        trainer = trainer_of(ranks, stage, ("bf16", "bf16"))
        accelerator, optimizer, current = get_accelerator(), trainer.engine.optimizer, Stream()
        assert optimizer.overlap_comm
        if asynchronous:
            optimizer.reduction_stream = Stream()
            monkeypatch.setattr(accelerator, "resolves_data_dependency", lambda: False)
            monkeypatch.setattr(accelerator, "current_stream", lambda *_, current=current: current)
            monkeypatch.setattr(accelerator, "synchronize", lambda *_: held.append("synchronize"))
            monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
        curves.append(torch.stack([trainer.update(batches(trainer, ranks, i), 1e-3, 0.9)[:4] for i in range(2)]))
        monkeypatch.undo()
        trainer.engine.destroy()
    assert not held
    assert torch.equal(*curves)
    # Once before an exchange (one bucket here), and once at its end, before its gradients are taken up.
    exchanges = 2 if stage == "zero1" else 2 * 2
    assert current.waited.count(optimizer.reduction_stream) == 2 * exchanges
    assert current in optimizer.reduction_stream.waited


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_a_step_on_a_gpu_waits_for_nothing(ranks: Ranks, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(ranks, stage, ("bf16", "bf16"))
    inputs = [batches(trainer, ranks, step) for step in range(4)]
    for step in inputs[:2]:
        trainer.update(step, 1e-3, 0.9)
    torch.cuda.synchronize()
    # The debug mode does not see a wait for the whole device.
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the host would wait: synchronize()"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [trainer.update(step, 1e-3, 0.9) for step in inputs[2:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        monkeypatch.undo()
    assert all(torch.isfinite(result[:5]).all() for result in results)
    trainer.engine.destroy()


@pytest.mark.slow
def test_compiled_blocks_have_no_breaks_and_compile_once(ranks: Ranks) -> None:
    torch._dynamo.reset()
    counters.clear()
    trainer = trainer_of(ranks, "zero1", ("fp32", "fp8"), compile=True)
    inputs = [batches(trainer, ranks, step) for step in range(5)]
    trainer.update(inputs[0], 1e-3, 0.9)
    assert not counters["graph_break"], dict(counters["graph_break"])
    made = counters["stats"]["unique_graphs"]
    # Teacher without gradients, student and decoder with them: a graph each, for all of their blocks.
    assert made == 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in inputs[1:]:
            trainer.update(step, 1e-3, 0.9)
    assert counters["stats"]["unique_graphs"] == made
    assert not counters["graph_break"]
    trainer.engine.destroy()


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_only_the_teachers_averages_are_gathered(ranks: Ranks, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(ranks, stage, ("fp32", "fp32"))
    assert trainer.teacher is not None
    wanted = set(dict(trainer.teacher.named_parameters()))
    gathered = []
    gather = trainer.shards.gather
    monkeypatch.setattr(trainer.shards, "gather", lambda flat, *rest: gathered.append(flat) or gather(flat, *rest))
    trainer.update(batches(trainer, ranks, 0), 1e-3, 0.9)
    found = {f.name for f in trainer.shards.fragments if f.flat in gathered}
    assert found == wanted
    assert len(wanted) < len(trainer.shards.shapes)
    trainer.engine.destroy()


def test_the_teachers_parameters_come_first_and_each_once() -> None:
    learner = pretraining(parse_recipe(tiny_tree(), "tiny"), torch.device("cpu"))
    names = [set(group["names"]) for group in learner.groups]
    assert learner.teacher is not None
    assert names[0] | names[1] == set(dict(learner.teacher.named_parameters()))
    assert sum(map(len, names)) == len(list(learner.student.parameters()))


def test_freed_memory_is_kept() -> None:
    if not keep_freed_memory():
        pytest.skip("another C library")

    def faults() -> int:
        return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[7])

    torch.ones(1 << 24).sum()  # 64 MiB, freed
    before = faults()
    for _ in range(4):
        torch.ones(1 << 24).sum()
    assert faults() - before < 16_000  # 65,536 pages were written


def test_a_step_that_the_machine_cannot_hold_is_refused_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, ranks = load_recipe("mae_vitb16"), Ranks(0, 1, 0, torch.device("cpu"), "none")
    monkeypatch.setattr(hostmemory, "memory_limit", lambda: 16 * 2**30)
    with pytest.raises(UserError, match=r"512 images on each of 1 ranks here need 28\.\d GiB.*16\.0; add") as caught:
        check_host_memory(recipe, ranks, 512, 8)
    advised = int(str(caught.value).rpartition("=")[2])
    assert 64 <= advised < 512
    check_host_memory(recipe, ranks, advised, 4096 // advised)
    with pytest.raises(UserError, match=f"={advised}$"):
        check_host_memory(recipe, ranks, 2 * advised, 2048 // advised)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"on each of 8 ranks here.*a smaller model"):
        check_host_memory(load_recipe("mae_vith14"), ranks, 8, 512)
    check_host_memory(recipe, Ranks(0, 1, 0, torch.device("cuda"), "none"), 512, 8)  # the device's memory is another
