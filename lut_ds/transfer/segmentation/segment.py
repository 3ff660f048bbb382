"""Training and evaluation of UPerNet on a pre-trained encoder: `lut-ds segment`.

RUN/recipe.yaml, environment.jsonl, metrics.jsonl, events.jsonl, checkpoints/   as a pre-training run's
    evaluations.jsonl   mIoU, mAcc, aAcc and the IoU of every class
    predictions.png     a few validation images, their masks and what the last evaluation predicted
    best/, last/        weights and config.json, for `load_segmenter`
    results.json        what the command printed
"""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lut_ds.config import Model
from lut_ds.engine.files import write_text_atomically
from lut_ds.engine.launch import discover_ranks, process_group, rank_cores
from lut_ds.engine.runfolder import check_run_folder, open_run_folder
from lut_ds.engine.signals import listen
from lut_ds.engine.step import split_batch
from lut_ds.engine.train import on_all, set_up_process, train, warm_up
from lut_ds.errors import UserError
from lut_ds.method.flops import blocks_flops
from lut_ds.transfer.segmentation.config import SegmentRecipe
from lut_ds.transfer.segmentation.judge import SegmentJudge
from lut_ds.transfer.segmentation.loader import SegmentLoader
from lut_ds.transfer.segmentation.start import build_segmenter, check_masks, model_config, open_masked, start_model
from lut_ds.transfer.segmentation.step import SegmentSchedule, SegmentTrainer


def segment(recipe: SegmentRecipe, recipe_name: str) -> dict[str, Any]:
    """Run, or continue, a training; the process must be one of the launcher's ranks.

    Returns:
        `Outcome.as_dict()` with `miou`, `macc`, `aacc` (per cent, of the last evaluation), `best` (epoch, step and the same of the
        best), `weights` (the best's file), `classes` (IoU by name, of the last evaluation) and `loaded` (what was taken from
        the source).

    Raises:
        UserError: recipe, source, data or run folder cannot work.
        RunFault: disk full, an image that cannot be decoded, or too many bad steps; the last good checkpoint is intact.
    """
    ranks = discover_ranks()
    set_up_process(recipe, ranks)
    micro_batch, accumulation = split_batch(recipe.train.global_batch, recipe.train.micro_batch, ranks.world_size)
    if micro_batch * ranks.world_size < 2:
        raise UserError(
            "train.micro_batch: batch norm in the heads needs at least 2 images over all ranks, found 1; raise it, or "
            "train.global_batch"
        )
    folder = Path(recipe.run.dir) if recipe.run.dir else Path("runs") / Path(recipe_name).stem
    threads = recipe.data.threads or min(8, rank_cores())
    with process_group(ranks), listen(recipe.run.stop_signals) as signals, ExitStack() as opened:
        images, val, names = on_all(lambda: open_masked(recipe), name_rank=True)
        on_all(lambda: check_run_folder(folder, recipe) if ranks.main else None)
        model, found, loaded = on_all(lambda: start_model(recipe, len(names)), name_rank=True)
        notes = warm_up(recipe, ranks, images)
        check_masks([images, val], ranks, threads)
        on_all(lambda: opened.enter_context(open_run_folder(folder, recipe, notes)) if ranks.main else None)
        loader = SegmentLoader(
            images,
            recipe,
            micro_batch=micro_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
            threads=threads,
        )
        config = model_config(recipe, model, found, names)
        flops = 3.0 * forward_flops(config)
        trainer = SegmentTrainer(recipe, ranks, model, found.normalised, micro_batch, accumulation)
        judge = SegmentJudge(recipe, ranks, folder, trainer, val, config, loader.steps_per_epoch, threads)
        schedule, every = SegmentSchedule(recipe), recipe.train.evaluate_every
        outcome = train(
            recipe, ranks, folder, loader, trainer, signals, schedule, flops, "segment", judge, evaluate_every=every
        )
        done = outcome.stopped_by is None
        result = {**outcome.as_dict(), **judge.results(), "loaded": asdict(loaded)}
        if done:
            judge.keep(folder / "last", outcome.step)
            if ranks.main:
                write_text_atomically(folder / "results.json", json.dumps(result, indent=1) + "\n")
        return result


def forward_flops(config: dict[str, Any]) -> float:
    """Of a forward pass of an image in training, through the model of a config.json: the heads' counted by torch."""
    sizes = Model(**config["sizes"])
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = build_segmenter(config).eval()
        maps = model.neck([torch.zeros(1, sizes.width, sizes.grid, sizes.grid)] * 4)
        model.head(maps)
        model.auxiliary(maps[2])
    encoder = blocks_flops(1 + sizes.patches, sizes.width, sizes.depth, sizes.mlp_ratio)
    return counter.get_total_flops() + 2 * sizes.patches * sizes.patch_dim * sizes.width + encoder
