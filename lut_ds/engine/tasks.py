"""The runs of a Slurm job, each checked before it queues: one recipe, a line of overrides for each task, or a sweep."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from lut_ds.config import Recipe, load_recipe
from lut_ds.engine.ds_config import load_ds_config
from lut_ds.engine.runfolder import check_run_folder, run_folder
from lut_ds.engine.step import check_batch_norm, split_batch
from lut_ds.engine.sweepfile import read_sweep
from lut_ds.engine.sweepstate import check_entry, check_images, trained
from lut_ds.errors import UserError

LAUNCHERS = ("srun", "torchrun", "deepspeed", "deepspeed-slurm")


@dataclass(frozen=True)
class Resources:
    """What a job asks of Slurm; None leaves it to the cluster.

    Attributes:
        nodes: machines.
        gpus_per_node: 0 trains on CPUs.
        ranks_per_node: processes a node; None: one a GPU, or one.
        warn_seconds: time before the limit, or from a preemption, in which to save.
        data_on_nodes: data.path need not exist here.
        container: image for srun's --container-image (Pyxis).
        setup: shell file whose lines run first on the batch node: modules, NCCL settings.
        extra: more options of sbatch, as they are.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    ranks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    job_name: str | None = None
    warn_seconds: int = 180
    launcher: str = "srun"
    data_on_nodes: bool = False
    container: str | None = None
    setup: str | None = None
    extra: tuple[str, ...] = ()

    @property
    def ranks_a_node(self) -> int:
        """Processes on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1


@dataclass(frozen=True)
class Task:
    """One run: its recipe, its folder, and the words after `lut-ds` that start it."""

    recipe: Recipe
    folder: Path
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """What is submitted: a job of one run, or an array with a task for each.

    Attributes:
        home: folder whose `submit/` takes the script and what is printed: the run's, or the one that all runs of an array share.
        left_out: runs of a sweep that are trained already.
    """

    home: Path
    tasks: tuple[Task, ...]
    left_out: int = 0


def plan_job(recipe_name: str | None, overrides: list[str], sweep: str | None, wanted: Resources) -> Job:
    """The runs of a job, each checked as far as it can be without its nodes.

    Args:
        recipe_name, overrides: as for `lut-ds pretrain`; a YAML sweep names its own recipe, and `run.dir` is its folder.
        sweep: file with a line of further overrides for each task of an array, `#` starts a comment; a line without a run.dir
            trains into a folder of the line's number below the run folder. Or the YAML file of `lut-ds sweep`: a task for each
            run that is not trained yet, in the folders where `lut-ds sweep FILE --out DIR` looks for them.
        wanted: what is asked of Slurm.

    Raises:
        UserError: a recipe that cannot train on these nodes, no data there, two runs in one folder, a folder that holds
            another run, a sweep whose runs are all trained.
    """
    if wanted.launcher not in LAUNCHERS:
        raise UserError(f"--launcher: expected one of {', '.join(LAUNCHERS)}, found {wanted.launcher!r}")
    if sweep is not None and sweep.endswith((".yaml", ".yml")):
        return _sweep_job(recipe_name, overrides, Path(sweep), wanted)
    if recipe_name is None:
        raise UserError("submit: expected a recipe, found none; name one, or a sweep's YAML file with --sweep")
    lines = [[]] if sweep is None else _sweep_lines(Path(sweep))
    tasks: list[Task] = []
    for index, line in enumerate(lines):
        own = [*overrides, *line]
        recipe = load_recipe(recipe_name, own)
        folder = run_folder(recipe, recipe_name)
        if sweep is not None and not any(word.startswith("run.dir=") for word in line):
            folder = folder / f"{index:03d}"
        folder = folder.absolute()
        _check(recipe, folder, wanted)
        if any(task.folder == folder for task in tasks):
            raise UserError(f"{sweep}: two lines share the run folder {folder}; give each its own run.dir, or none")
        name = str(Path(recipe_name).absolute()) if recipe_name.endswith((".yaml", ".yml")) else recipe_name
        kept = [word for word in own if not word.startswith("run.dir=")]
        tasks.append(Task(recipe, folder, ("pretrain", name, *kept, f"run.dir={folder}")))
    home = tasks[0].folder if sweep is None else run_folder(load_recipe(recipe_name, overrides), recipe_name).absolute()
    return Job(home, tuple(tasks))


def _sweep_job(recipe_name: str | None, overrides: list[str], sweep: Path, wanted: Resources) -> Job:
    """A task for each run of a YAML sweep that is not trained yet."""
    if recipe_name is not None:
        raise UserError(
            f"submit: expected no recipe beside {sweep}, which names its own, found {recipe_name!r}; leave it out"
        )
    folders = [word.removeprefix("run.dir=") for word in overrides if word.startswith("run.dir=")]
    out = Path(folders[-1] if folders else Path("runs") / sweep.stem).absolute()
    entries = read_sweep(sweep, out, [word for word in overrides if not word.startswith("run.dir=")]).entries
    for entry in entries:
        try:
            check_entry(entry)
            _check(entry.recipe, entry.folder, wanted)
            if not wanted.data_on_nodes:
                check_images(entry)
        except UserError as error:
            raise UserError(f"sweep {sweep}: runs.{entry.name}: {error}") from None
    todo = [entry for entry in entries if not trained(entry)]
    if not todo:
        raise UserError(
            f"submit: {sweep}: expected a run that is not trained yet in {out}, found none of {len(entries)}; make the table "
            f"with `lut-ds sweep {sweep} --out {out}`"
        )
    tasks = [Task(entry.recipe, entry.folder, ("pretrain", *entry.words)) for entry in todo]
    return Job(out, tuple(tasks), len(entries) - len(todo))


def _sweep_lines(path: Path) -> list[list[str]]:
    try:
        lines = [shlex.split(line, comments=True) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--sweep: {path}: {error}; expected a line of section.key=value words for each run") from error
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"--sweep: {path} has no line; expected a line of section.key=value words for each run")
    return lines


def _check(recipe: Recipe, folder: Path, wanted: Resources) -> None:
    """What would end the run after it has waited in the queue."""
    ranks = wanted.nodes * wanted.ranks_a_node
    try:
        micro_batch, _ = split_batch(recipe.train.global_batch, recipe.train.micro_batch, ranks)
        check_batch_norm(recipe, micro_batch * ranks)
    except UserError as error:
        raise UserError(f"--nodes {wanted.nodes} x {wanted.ranks_a_node} ranks: {error}") from error
    load_ds_config(recipe)
    if recipe.data.path is None:
        raise UserError("data.path: no image folder given; add data.path=DIR, where DIR holds train/<class>/*.jpg")
    plain = not set("*?[{:") & set(recipe.data.path)  # neither a pattern nor a source of one's own
    if plain and not wanted.data_on_nodes and not os.path.exists(recipe.data.path):
        raise UserError(
            f"data.path: {recipe.data.path} does not exist here; correct it, or add --data-on-nodes if only the nodes have it"
        )
    check_run_folder(folder, recipe)
