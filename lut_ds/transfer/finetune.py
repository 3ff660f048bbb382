"""Fine-tuning of a pre-trained encoder as a classifier: `lut-ds finetune`.

RUN/recipe.yaml, environment.jsonl, metrics.jsonl, events.jsonl, checkpoints/   as a pre-training run's
    evaluations.jsonl   accuracy on val after every epoch: of all images, the mean of classes, and of those with many, medium
                        (100 to 20) and few training images
    per_class.json      accuracy of each class in the last evaluation, and its training images
    best/               the best epoch's classifier as a timm checkpoint
    last/               the last step's, when the run is done
    results.json        what the command printed
"""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lut_ds.data.tuning import Loading, choose_loading
from lut_ds.engine.files import write_text_atomically
from lut_ds.engine.launch import Ranks, discover_ranks, process_group, rank_cores
from lut_ds.engine.runfolder import open_run_folder
from lut_ds.engine.signals import listen
from lut_ds.engine.step import split_batch
from lut_ds.engine.train import on_all, set_up_process, train, warm_up
from lut_ds.method.flops import blocks_flops
from lut_ds.transfer.config import FinetuneRecipe
from lut_ds.transfer.finetune_judge import FinetuneJudge
from lut_ds.transfer.finetune_loader import FinetuneLoader
from lut_ds.transfer.finetune_start import open_images, sizes, start_model
from lut_ds.transfer.finetune_step import FinetuneSchedule, FinetuneTrainer
from lut_ds.transfer.labelled import labels_of


def finetune(recipe: FinetuneRecipe, recipe_name: str) -> dict[str, Any]:
    """Run, or continue, a fine-tuning; the process must be one of the launcher's ranks.

    Returns:
        `Outcome.as_dict()` with `top1`, `top5`, `mean_class`, `many`, `medium`, `few` (per cent, of the last evaluation), `best`
        (epoch, step and the same of the best), `weights` (the best's timm checkpoint) and `loaded` (what was taken from the source).

    Raises:
        UserError: recipe, source, data or run folder cannot work.
        RunFault: disk full, too much unreadable data, or too many bad steps; the last good checkpoint is intact.
    """
    ranks = discover_ranks()
    set_up_process(recipe, ranks)
    micro_batch, accumulation = split_batch(recipe.train.global_batch, recipe.train.micro_batch, ranks.world_size)
    folder = Path(recipe.run.dir) if recipe.run.dir else Path("runs") / Path(recipe_name).stem
    with process_group(ranks), listen(recipe.run.stop_signals) as signals, ExitStack() as opened:
        source, val = on_all(lambda: open_images(recipe), name_rank=True)
        model, loaded = on_all(lambda: start_model(recipe, source.classes), name_rank=True)
        notes = warm_up(recipe, ranks, source)
        on_all(lambda: opened.enter_context(open_run_folder(folder, recipe, notes)) if ranks.main else None)
        ways = _loading(recipe, ranks)
        loader = FinetuneLoader(
            source,
            recipe,
            micro_batch=micro_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
            loading=vars(ways),
        )
        with loader:
            trainer = FinetuneTrainer(recipe, ranks, model, micro_batch, accumulation)
            counts = np.bincount(labels_of(source), minlength=len(source.classes)).tolist()
            judge = FinetuneJudge(recipe, ranks, folder, trainer, val, counts, loader.steps_per_epoch, ways.threads)
            schedule = FinetuneSchedule(recipe, loader.steps_per_epoch)
            outcome = train(
                recipe,
                ranks,
                folder,
                loader,
                trainer,
                signals,
                schedule,
                _flops(recipe),
                title="finetune",
                evaluate=judge,
            )
            done = outcome.stopped_by is None
            result = {**outcome.as_dict(), **judge.results(), "loaded": asdict(loaded)}
            if done:
                judge.keep(folder / "last", outcome.step)
        if ranks.main and done:
            write_text_atomically(folder / "results.json", json.dumps(result, indent=1) + "\n")
        return result


def _flops(recipe: FinetuneRecipe) -> float:
    """Of a training step, an image: forward and backward."""
    m = sizes(recipe)
    return 3.0 * (2 * m.patches * m.patch_dim * m.width + blocks_flops(1 + m.patches, m.width, m.depth, m.mlp_ratio))


def _loading(recipe: FinetuneRecipe, ranks: Ranks) -> Loading:
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None
    data = recipe.data
    return choose_loading(data.threads, data.prefetch, data.hw_decoder_load, rank_cores(), gpu, recipe.model.image_size)
