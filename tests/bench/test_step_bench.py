"""The step's benchmark: ours, the expert's baseline and a published checkout really run; figures and ratios agree."""

import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lut_kernels.dispatch import current_mode

from lut_ds.bench.breakdown import Breakdown
from lut_ds.bench.ceiling import add_utilisation, peak_flops
from lut_ds.bench.expert import Expert
from lut_ds.bench.peers import check_checkout
from lut_ds.bench.profiling import covered
from lut_ds.bench.step import Options, bench_step, make_tasks, run_task, step_recipe
from lut_ds.bench.step_run import measure, normalised, synthetic_batches
from lut_ds.config import Recipe, load_recipe
from lut_ds.engine.build import build_student, flops_shape
from lut_ds.engine.launch import Ranks, discover_ranks, process_group
from lut_ds.engine.step import Trainer
from lut_ds.errors import UserError
from lut_ds.method.flops import step_flops
from tests.data.images import write_folder
from tests.engine.launching import PATIENCE
from tests.test_cli import result

PARTS = ("data_wait", "teacher", "student", "decoder", "heads", "losses", "backward", "optimizer", "ema", "other")
TINY = (
    "model.image_size=32", "model.patch_size=8", "model.width=32", "model.depth=1", "model.heads=2", "method.head_hidden=32",
    "model.decoder_width=32", "model.decoder_depth=1", "model.decoder_heads=2", "train.deepspeed=cpu",
    "precision.compute=fp32", "precision.teacher=fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Recipe:
    """A LUT recipe of one small block, 8 images a step."""
    return step_recipe("lut_vits16", None, TINY, 8)


@pytest.mark.slow
def test_measures_ours_and_its_parts(tmp_path: Path) -> None:
    words = ["--batch", 8, "--steps", 2, "--rounds", 1, "--trace", tmp_path / "trace.json"]
    images = write_folder(tmp_path / "images", 16)
    found = result("bench", "step", "lut_vits16", *TINY, f"data.path={images}", *words)
    sides = found["sides"]
    assert set(sides) == {"ours", "ours from files"}
    for figures in sides.values():
        speed = figures["images_per_s"]["median"]
        assert speed == pytest.approx(8e3 / figures["step_ms"]["median"])
        assert figures["memory_mib"]["median"] > 100
        assert figures["of_ceiling"]["median"] == pytest.approx(
            speed * found["flops"]["total"] / found["ceilings"]["fp32"]
        )
        parts = {key.removeprefix("ms_"): v["median"] for key, v in figures.items() if key.startswith("ms_")}
        assert set(parts) == {*PARTS, "whole", "communication"}
        assert sum(parts[name] for name in PARTS) == pytest.approx(parts["whole"], rel=0.01)
        assert parts["data_wait"] > 0
    assert sides["ours from files"]["loss"] != sides["ours"]["loss"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"aten::mm", "lut_kernels::gather_patches"} & {event.get("name") for event in events}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """A lone rank's process group; what it sets in the environment is taken back."""
    before = dict(os.environ)
    found = discover_ranks()
    with process_group(found):
        os.environ.clear()
        os.environ.update(before)
        yield found


class Clock:
    """Stands for the time: passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def slow(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        """The same function, which takes this long."""

        def slower(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return slower


@pytest.mark.parametrize(
    "words", [(), ("train.deepspeed=zero3", "train.activation_checkpointing=true")], ids=("zero1", "zero3")
)
def test_each_part_gets_the_time_that_it_takes(
    words: tuple[str, ...], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    recipe, clock = step_recipe("lut_vits16", None, [*TINY, *words], 8), Clock()
    trainer = Trainer(recipe, ranks, 8, 1)
    student, batches = trainer.student, synthetic_batches(recipe, 8, ranks.device)
    takes = {
        "teacher": (trainer.teacher, "forward", 0.1),
        "student": (student.encoder, "forward", 0.2),
        "decoder": (student.decoder, "forward", 0.3),
        "heads": (student, "predict", 0.4),
        "losses": (student, "mask", 0.5),
        "backward": (trainer.engine, "backward", 0.6),
        "optimizer": (trainer, "_step", 0.7),
        "ema": (trainer.ema, "update", 0.8),
        "other": (trainer, "_share", 0.9),
    }
    for owner, name, seconds in takes.values():
        monkeypatch.setattr(owner, name, clock.slow(getattr(owner, name), seconds))
    monkeypatch.setattr("lut_ds.bench.breakdown.time", clock)
    with Breakdown(trainer) as parts:
        source = parts.waiting(iter(clock.slow(lambda: next(batches), 1.0), None))
        for _ in range(2):
            parts.step(lambda: trainer.update(itertools.islice(source, 1), 1e-4, 0.99)[0])
    found = parts.milliseconds()
    trainer.engine.destroy()
    expected = {"data_wait": 1.0, **{part: seconds for part, (_, _, seconds) in takes.items()}}
    assert set(expected) == set(PARTS)
    assert found == pytest.approx({**{part: 1e3 * s for part, s in expected.items()}, "whole": 5500})


def test_spans_that_overlap_count_once() -> None:
    assert covered([(5, 7), (0, 2), (1, 3), (1.5, 1.6)]) == 5
    assert covered([]) == 0


def test_the_expert_trains_the_same_work(tiny: Recipe) -> None:
    torch.manual_seed(0)
    expert = Expert(tiny, torch.device("cpu"), False)
    ours = sum(p.numel() for p in build_student(tiny).parameters())
    assert sum(p.numel() for p in expert.student.parameters()) == ours  # both keep positions out of the parameters
    batch = next(synthetic_batches(tiny, 8, torch.device("cpu")))
    images = torch.cat(normalised(batch.views))
    before = [p.clone() for p in expert.teacher.parameters()]  # type: ignore[union-attr]
    losses = [float(expert.step(images, batch.noise)) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.05
    moved = [not torch.equal(a, b) for a, b in zip(before, expert.teacher.parameters(), strict=True)]  # type: ignore[union-attr]
    assert all(moved)


def test_the_experts_target_is_the_methods(tiny: Recipe) -> None:
    student = Expert(tiny, torch.device("cpu"), False).student
    images = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).view(2, 3, 32, 32)
    rows = student.patchify(images)
    assert rows.shape == (2, 16, 8 * 8 * 3)
    corner = images[1, :, 8:16, 16:24].permute(1, 2, 0).reshape(-1)  # second row of patches, third column
    assert torch.equal(rows[1, 4 + 2], corner)


@pytest.mark.slow
def test_the_expert_is_measured_too(tiny: Recipe) -> None:
    tasks, _ = make_tasks(tiny, Options(batch=8, steps=2, warmup=1, expert=True, threads=1), "cpu")
    figures = run_task(tasks["expert"])
    assert figures["images_per_s"] == pytest.approx(8e3 / figures["step_ms"])


def test_tasks_follow_the_options(tiny: Recipe) -> None:
    tasks, left_out = make_tasks(tiny, Options(batch=8, variants=True, expert=True), "cpu")
    assert left_out == {"triton kernels": "Triton needs a GPU", "fp8 teacher": "no fp8 tensor cores here"}
    assert tasks["half micro-batch"].recipe["train"]["micro_batch"] == 4
    assert tasks["zero3"].recipe["train"]["deepspeed"] == "zero3"
    assert tasks["bf16"].recipe["precision"] == {"compute": "bf16", "teacher": "bf16"}
    assert tasks["library kernels"].kernels == "torch"
    assert tasks["expert compiled"].recipe["train"]["compile"] is True
    assert {task.side for task in tasks.values() if task.breakdown} == {"ours"}
    assert all(task.breakdown for task in tasks.values() if task.side == "ours")  # every variant too
    assert "half micro-batch" in make_tasks(tiny, Options(batch=7, variants=True), "cpu")[1]


@pytest.mark.slow
def test_steps_on_ready_images_need_no_dali() -> None:
    blocked = "import sys; sys.modules['nvidia.dali'] = None; import lut_ds.bench.step, lut_ds.bench.step_run as run; "
    done = subprocess.run([sys.executable, "-c", f"{blocked}run.make_loader"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_kernels_are_forced_while_a_side_runs(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, _ = make_tasks(tiny, Options(batch=8, variants=True, expert=True), "cpu")
    found = []
    monkeypatch.setattr("lut_ds.bench.step_run._measure_expert", lambda *_: found.append(current_mode()) or {})
    for name in ("library kernels", "ours"):
        measure(replace(tasks[name], side="expert"))
    assert found == ["torch", current_mode()]


def test_refuses_what_it_cannot_measure(tmp_path: Path, tiny: Recipe) -> None:
    with pytest.raises(UserError, match="a recipe or --model"):
        step_recipe(None, None, (), 8)
    with pytest.raises(UserError, match="a recipe or --model"):
        step_recipe("demo", "vit_small_patch16_224", (), 8)
    with pytest.raises(UserError, match=r"--model: expected one of vit_small.*found 'resnet50'"):
        step_recipe(None, "resnet50", (), 8)
    with pytest.raises(UserError, match=r"found no engines/engine_lut\.py in it"):
        bench_step(tiny, Options(peers=(("lut", str(tmp_path)),)))
    with pytest.raises(UserError, match=r"--peer-mae: the recipe trains lut"):
        bench_step(tiny, Options(peers=(("mae", str(tmp_path)),)))
    with pytest.raises(UserError, match=r"--trace .*: expected a file that can be written"):
        bench_step(tiny, Options(trace=str(tmp_path)))
    refused = {
        "batch norm in the heads needs at least 2 images": "train.micro_batch=1",
        "expected at least the 8 images of a step, found 4": f"data.path={write_folder(tmp_path / 'images', 4)}",
        r"--peers: expected method\.head_norm=bn": "method.head_norm=ln",
        r"--peers: expected method\.degradation=none": "method.degradation=blurred",
    }
    for message, words in refused.items():
        recipe = step_recipe("lut_vits16", None, [*TINY, words], 8)
        with pytest.raises(UserError, match=message):
            bench_step(recipe, Options(expert="--peers" in message))
    assert step_recipe(None, "vit_large_patch16_224", (), 4).model.width == 1024


def test_mfu_counts_the_method(tiny: Recipe) -> None:
    flops = step_flops(flops_shape(tiny))["total"]
    for precision, peak in (("bf16", 989e12), ("fp32", 67e12)):
        figures = {"images_per_s": 1000.0}
        assert peak_flops("NVIDIA H100 80GB HBM3", precision) == peak
        add_utilisation(figures, flops, 2 * peak, 1e12)
        assert figures["mfu"] == pytest.approx(1000 * flops / (2 * peak))
        assert figures["of_ceiling"] == pytest.approx(1000 * flops / 1e12)
    assert peak_flops("NVIDIA GeForce", "bf16") is None
    add_utilisation(figures := {"images_per_s": 1.0}, 1.0, None, 1.0)
    assert "mfu" not in figures


@pytest.mark.parametrize(
    "name, gflop", [("lut_vitb16", 156), ("lut_vitl16", 463), ("lut_vith14", 1209), ("mae_vitl16", 125)]
)
def test_the_methods_flops_counted_again(name: str, gflop: float) -> None:
    """From the architecture alone: multiply-adds of every product, twice; a backward pass is two forward ones."""
    m = load_recipe(name).model
    kept, pixels, views = m.patches // 4, m.patch_size**2 * 3, 2 if name.startswith("lut") else 1

    def blocks(tokens: int, width: int, depth: int) -> int:
        return depth * (tokens * (3 + 1 + 4 + 4) * width**2 + 2 * tokens**2 * width)

    embed, head = m.patches * pixels * m.width, 2 * m.width * 4096
    student = views * (embed + blocks(1 + kept, m.width, m.depth))
    decoder = blocks(1 + m.patches, m.decoder_width, m.decoder_depth)
    decoder += m.decoder_width * ((1 + kept) * m.width + (1 + m.patches) * pixels)
    heads, teacher = 2 * views * head, views * (embed + blocks(1 + m.patches, m.width, m.depth) + head)
    total = 2 * (3 * (student + decoder) + (3 * heads + teacher) * (views == 2))
    assert step_flops(flops_shape(load_recipe(name)))["total"] == total
    assert total / 1e9 == pytest.approx(gflop, rel=0.005)


def test_synthetic_images_are_noise_in_rotation(tiny: Recipe) -> None:
    source = synthetic_batches(load_recipe("lut_vits16", TINY), 4, torch.device("cpu"))
    first, second = next(source), next(source)
    assert first.views[0].shape == (4, 32, 32, 3)
    assert len(first.views) == 2
    assert not torch.equal(first.views[0], first.views[1])
    assert not torch.equal(first.views[0], second.views[0])
    mean = torch.cat(normalised(first.views)).mean((0, 2, 3))
    assert torch.allclose(mean, (torch.tensor([0.5, 0.5, 0.5]) - torch.tensor([0.485, 0.456, 0.406])) / 0.226, atol=0.1)


def published(root: Path) -> Path:
    """A checkout with the published layout: a model, EMA and loop of the published names, in a few lines of our own."""
    files = {
        "models/models_lut.py": """
            import torch
            from torch import nn
            from timm.models.vision_transformer import PatchEmbed, Block
            from util.utils_dino import trunc_normal_
            class MaskedAutoencoderViT_LUT(nn.Module):
                def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim, decoder_depth,
                             decoder_num_heads, mlp_ratio, norm_layer, norm_pix_loss, depth_head, depth_pred, head_mlp_dim,
                             head_norm_layer, head_act_layer):
                    super().__init__()
                    self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim)
                    self.block = Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, qk_scale=None, norm_layer=norm_layer)
                def forward(self, first, second, mask_ratio, ema=False):
                    x = torch.cat([self.block(self.patch_embed(v)).mean(1) for v in (first, second)])
                    return x.square().mean(), x, None
        """,
        "engines/engine_lut.py": """
            import torch
            from torch._six import inf
            def train_one_epoch(model, data_loader, optimizer, device, epoch, loss_scaler, model_ema, args):
                seen = 0
                for (views, _) in data_loader:
                    loss, out, _ = model(views[0], views[1], mask_ratio=args.mask_ratio)
                    loss_scaler(loss * args.w_mae, optimizer, parameters=model.parameters())
                    model_ema.update(model, seen)
                    assert loss_scaler.state_dict()["scale"] > 0
                    torch.cuda.synchronize()
                    seen += 1
                return {"loss": loss.item(), "batches": seen}
        """,
        "util/misc.py": """
            class NativeScalerWithGradNormCount:
                def __call__(self, loss, optimizer, parameters): loss.backward(); optimizer.step()
                def state_dict(self): return {}
        """,
        "util/model_ema_sched.py": """
            import copy
            class ModelEma_sched:
                def __init__(self, model, decay): self.ema, self.decay = copy.deepcopy(model), decay
                def update(self, model, i): assert self.decay[i] == 0.996
        """,
    }  # fmt: skip
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(textwrap.dedent(text))
    return root


@pytest.mark.slow
def test_a_published_checkout_is_timed_as_it_is(tmp_path: Path) -> None:
    folder = published(tmp_path / "theirs")
    before = {p: p.read_text() for p in folder.rglob("*.py")}
    assert check_checkout("lut", str(folder)) == folder
    words = ["--batch", 8, "--steps", 2, "--rounds", 1, "--peer-lut", folder]
    found = result("bench", "step", "lut_vits16", *TINY, *words)
    assert found["sides"]["published lut"]["images_per_s"]["median"] > 0
    assert "published lut" in found["ratios"]
    assert {p: p.read_text() for p in folder.rglob("*.py")} == before


@pytest.mark.slow
def test_two_ranks_measure_together() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lut_ds"]
    done = subprocess.run(
        [*command, "bench", "step", "lut_vits16", *TINY, "--batch", "8", "--steps", "2", "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["options"]["world_size"] == 2
    # No bound from above: it is of steps of its own, in which ranks that share busy cores may wait long for each other.
    assert found["sides"]["ours"]["ms_communication"]["median"] > 0
