"""What a run will be, before it starts: parameters, tokens, FLOPs, steps, memory. Nothing is allocated on a device."""

from typing import Any

import torch

from lut_ds.config import Recipe
from lut_ds.data.sources import open_source
from lut_ds.engine.build import build_student, flops_shape
from lut_ds.engine.ds_config import load_ds_config, zero_stage
from lut_ds.engine.launch import check_accelerator
from lut_ds.engine.memory import memory
from lut_ds.engine.schedules import peak_lr
from lut_ds.engine.step import split_batch
from lut_ds.errors import UserError
from lut_ds.method.flops import step_flops
from lut_ds.method.lut import LUT


def parameter_counts(recipe: Recipe) -> dict[str, int]:
    """Trainable parameters of each part, the teacher's and the total, from modules on the meta device."""
    with torch.device("meta"):
        student = build_student(recipe)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in student.named_children()}
    counts["student"] = sum(counts.values())
    counts["teacher"] = counts["encoder"] + counts["projector"] if isinstance(student, LUT) else 0
    return counts


def plan(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The whole plan as JSON values; see `describe_plan` for people.

    Raises:
        UserError: no data, or sizes that do not fit together.
    """
    check_accelerator()
    if recipe.data.path is None:
        raise UserError("data.path: no image folder given; add data.path=DIR, where DIR holds train/<class>/*.jpg")
    images = len(open_source(recipe.data.path, split="train"))
    config = load_ds_config(recipe)
    stage = zero_stage(config)
    micro_batch, accumulation = split_batch(recipe.train.global_batch, recipe.train.micro_batch, world_size)
    steps_per_epoch = images // recipe.train.global_batch
    warnings = []
    if steps_per_epoch == 0:
        problem = f"{images} images in {recipe.data.path} are fewer than train.global_batch {recipe.train.global_batch}"
        warnings.append(f"{problem}: this run would be refused; lower train.global_batch")
    steps = min(steps_per_epoch * recipe.train.epochs, recipe.train.max_steps or steps_per_epoch * recipe.train.epochs)
    counts = parameter_counts(recipe)
    shape = flops_shape(recipe)
    held = memory(recipe, config, world_size, micro_batch, accumulation)
    gib = {part: size / 2**30 for part, size in held.parts.items()}
    flops = step_flops(shape)
    return {
        "images": images,
        "world_size": world_size,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "global_batch": recipe.train.global_batch,
        "steps_per_epoch": steps_per_epoch,
        "steps": steps,
        "epochs": recipe.train.epochs,
        "peak_lr": peak_lr(recipe.optim.blr, recipe.train.global_batch, recipe.optim.lr_rule),
        "parameters": counts,
        "tokens": {
            "patches": shape.patches,
            "student_per_view": 1 + shape.kept,
            "views": shape.views,
            "teacher_per_view": 1 + shape.patches if counts["teacher"] else 0,
            "decoder": 1 + shape.patches,
        },
        "gflop_per_image": {name: value / 1e9 for name, value in flops.items()},
        "total_eflop": flops["total"] * recipe.train.global_batch * steps / 1e18,
        "zero_stage": stage,
        "memory_gib_per_rank": {**gib, "total": sum(gib.values())},
        "warnings": warnings,
    }


def describe_plan(name: str, planned: dict[str, Any]) -> str:
    """The plan as lines for a person."""
    v = planned
    p, t, f, m = v["parameters"], v["tokens"], dict(v["gflop_per_image"]), dict(v["memory_gib_per_rank"])
    total_flops, total_memory = f.pop("total"), m.pop("total")
    parts = ", ".join(f"{part} {p[part] / 1e6:.1f} M" for part in p if part not in ("student", "teacher"))
    teacher = f"; teacher {p['teacher'] / 1e6:.1f} M" if p["teacher"] else ""
    teacher_tokens = f", teacher {t['views']} x {t['teacher_per_view']}" if t["teacher_per_view"] else ""
    steps = f"{v['steps_per_epoch']:,} steps an epoch, {v['steps']:,} steps (schedule of {v['epochs']} epochs)"
    batch = f"{v['global_batch']} = {v['world_size']} rank(s) x {v['micro_batch']} x {v['accumulation']} accumulation"
    rows = {
        "data": f"{v['images']:,} images, {steps}",
        "batch": f"{batch}; peak lr {v['peak_lr']:.3e}",
        "parameters": f"student {p['student'] / 1e6:.1f} M ({parts}){teacher}",
        "tokens": f"{t['patches']} patches; student {t['views']} x {t['student_per_view']}{teacher_tokens}, decoder {t['decoder']}",
        "FLOPs": f"{total_flops:.1f} GFLOP an image ({_list(f, '.1f')}); {v['total_eflop']:.3g} EFLOP in all",
        "memory": f"{total_memory:.1f} GiB a rank, ZeRO stage {v['zero_stage']} ({_list(m, '.2f')}); without CUDA's and NCCL's own",
    }
    warnings = [f"  warning     {warning}" for warning in v["warnings"]]
    return "\n".join([f"plan of {name}", *(f"  {key:11} {text}" for key, text in rows.items()), *warnings])


def _list(values: dict[str, float], form: str) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())
