"""A pre-training as a Slurm job: the batch script of a recipe, checked before it queues, and handed to sbatch."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lut_ds.config import Recipe, load_recipe
from lut_ds.engine.ds_config import load_ds_config
from lut_ds.engine.runfolder import check_run_folder, run_folder
from lut_ds.engine.step import check_batch_norm, split_batch
from lut_ds.engine.sweepfile import read_sweep
from lut_ds.errors import UserError

LAUNCHERS = ("srun", "torchrun", "deepspeed", "deepspeed-slurm")
WARNING = "USR1"  # from Slurm to the batch script alone, which traps it; the ranks get `stop_signal`


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
    """One run of a job: a job has one, a job array one for each of its tasks."""

    recipe: Recipe
    folder: Path
    arguments: tuple[str, ...]


def plan_tasks(recipe_name: str | None, overrides: list[str], sweep: str | None, wanted: Resources) -> list[Task]:
    """The runs of a job, each checked as far as it can be without its nodes.

    Args:
        recipe_name, overrides: as for `lut-ds pretrain`; a YAML sweep names its own recipe, and `run.dir` is its folder.
        sweep: file with a line of further overrides for each task of an array, `#` starts a comment; a line without a run.dir
            trains into a folder of the line's number below the run folder. Or the YAML file of `lut-ds sweep`: a task for each
            run, in the folders where `lut-ds sweep FILE --out DIR` looks for them.
        wanted: what is asked of Slurm.

    Raises:
        UserError: a recipe that cannot train on these nodes, no data there, two runs in one folder, a folder that holds
            another run.
    """
    if wanted.launcher not in LAUNCHERS:
        raise UserError(f"--launcher: expected one of {', '.join(LAUNCHERS)}, found {wanted.launcher!r}")
    if sweep is not None and sweep.endswith((".yaml", ".yml")):
        return _sweep_tasks(recipe_name, overrides, Path(sweep), wanted)
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
    return tasks


def _sweep_tasks(recipe_name: str | None, overrides: list[str], sweep: Path, wanted: Resources) -> list[Task]:
    """A task for each run of a YAML sweep."""
    if recipe_name is not None:
        raise UserError(
            f"submit: expected no recipe beside {sweep}, which names its own, found {recipe_name!r}; leave it out"
        )
    folder = next((word.removeprefix("run.dir=") for word in overrides if word.startswith("run.dir=")), None)
    out = Path(folder or Path("runs") / sweep.stem).absolute()
    entries = read_sweep(sweep, out, [word for word in overrides if not word.startswith("run.dir=")]).entries
    for entry in entries:
        _check(entry.recipe, entry.folder, wanted)
    return [Task(entry.recipe, entry.folder, ("pretrain", *entry.words)) for entry in entries]


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


def script_folder() -> Path:
    """Folder of the shipped batch scripts: inside an installed package, beside it in a checkout."""
    package = Path(str(resources.files("lut_ds")))
    return package / "launch" if (package / "launch").is_dir() else package.parent / "launch"


def render(tasks: list[Task], wanted: Resources, name: str) -> str:
    """The batch script: options, settings of this job, and the body that all scripts share (launch/job.sh).

    Raises:
        UserError: a value that an `#SBATCH` line cannot hold, or a setup file that cannot be read.
    """
    folder = tasks[0].folder if len(tasks) == 1 else tasks[0].folder.parent
    pattern = "%j" if len(tasks) == 1 else "%A_%a"
    options = {
        "job-name": wanted.job_name or name,
        "nodes": wanted.nodes,
        "ntasks-per-node": wanted.ranks_a_node,
        "gpus-per-node": wanted.gpus_per_node or None,
        "cpus-per-task": wanted.cpus_per_task,
        "time": wanted.time,
        "partition": wanted.partition,
        "account": wanted.account,
        "qos": wanted.qos,
        "constraint": wanted.constraint,
        "array": f"0-{len(tasks) - 1}" if len(tasks) > 1 else None,
        "signal": f"B:{WARNING}@{wanted.warn_seconds}",
        "open-mode": "append",
        "chdir": Path.cwd(),
        "output": f"{str(folder).replace('%', '%%')}/submit/slurm-{pattern}.out",
    }
    header = [f"#SBATCH --{key}={_sbatch_value(key, value)}" for key, value in options.items() if value is not None]
    header += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in wanted.extra)]
    sections = ["#!/bin/bash", *header, "", *_settings(tasks, wanted), "", (script_folder() / "job.sh").read_text()]
    return "\n".join(sections)


def _settings(tasks: list[Task], wanted: Resources) -> list[str]:
    """Shell lines: what job.sh reads."""
    lines = []
    if wanted.setup is not None:
        try:
            lines += [f"# from {wanted.setup}", Path(wanted.setup).read_text().rstrip(), ""]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--setup: {wanted.setup} cannot be read: {error}; name a shell file") from error
    if wanted.gpus_per_node == 0:
        lines.append("export DS_ACCELERATOR=cpu")
    lines += [
        f"python={shlex.quote('python' if wanted.container else sys.executable)}",
        f"launcher={wanted.launcher}",
        f"ranks_per_node={wanted.ranks_a_node}",
    ]
    if wanted.container:
        mounts = sorted({"/dev/shm", str(Path.cwd()), *(str(p) for task in tasks for p in _seen(task))})
        options = [f"--container-image={wanted.container}", f"--container-mounts={','.join(mounts)}"]
        options += [f"--container-workdir={Path.cwd()}", "--no-container-mount-home"]
        lines.append(f"srun_options=({shlex.join(options)})")
    own = [f"stop_signal={stop_signal(task.recipe)} arguments=({shlex.join(task.arguments)})" for task in tasks]
    if len(tasks) == 1:
        return [*lines, *own]
    cases = [f"{index}) {line} ;;" for index, line in enumerate(own)]
    return [*lines, 'case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]


def stop_signal(recipe: Recipe) -> str:
    """What tells the ranks to save and stop, as Slurm names it: USR1 if they listen to it, else the first they do.

    Raises:
        UserError: they listen to none, so that a warning would end them without a checkpoint.
    """
    names = [name.removeprefix("SIG") for name in recipe.run.stop_signals]
    if not names:
        raise UserError(
            "run.stop_signals: expected at least one signal for a job, found none: nothing could tell the ranks to save "
            "before the time limit; leave the default, or name one"
        )
    return "USR1" if "USR1" in names else names[0]


def _seen(task: Task) -> list[Path]:
    """Folders that a container must see."""
    assert task.recipe.data.path is not None
    recipe = [Path(task.arguments[1]).parent] if "/" in task.arguments[1] else []
    return [task.folder, Path(task.recipe.data.path).absolute(), *recipe]


def _sbatch_value(key: str, value: object) -> str:
    """A value as sbatch reads it in a script: in quotes where it has blanks; a line cannot hold more than that."""
    text = str(value)
    if not text or any(ord(c) < 32 or c in "\"'\\" for c in text):
        raise UserError(
            f"--{key}: expected text without quotes, backslashes and line breaks, found {text!r}; rename it"
        )
    return f'"{text}"' if re.search(r"[\s#]", text) else text


def submit(
    recipe_name: str | None,
    overrides: list[str],
    wanted: Resources,
    environment: Mapping[str, str],
    sweep: str | None = None,
    dry_run: bool = False,
) -> tuple[dict[str, Any], str]:
    """Write the batch script of a recipe into its run folder (`submit/job.sbatch`) and submit it.

    Args:
        recipe_name, overrides, sweep: see `plan_tasks`.
        wanted: what is asked of Slurm.
        environment: what the job starts with, as sbatch passes its own on.
        dry_run: write and submit nothing.

    Returns:
        (result, text): the job's number, script and run folders, for `--json` and for people. Of a dry run the
        text is the script.

    Raises:
        UserError: see `plan_tasks` and `render`; no sbatch here, or sbatch refused the script.
    """
    tasks = plan_tasks(recipe_name, overrides, sweep, wanted)
    script = render(tasks, wanted, Path(recipe_name or str(sweep)).stem)
    folders = [str(task.folder) for task in tasks]
    if dry_run:
        return {"job": None, "script": script, "folders": folders}, script.rstrip("\n")
    if shutil.which("sbatch") is None:
        raise UserError(
            "submit: no sbatch on this machine; run it on a login node of the cluster, or see the script with --dry-run"
        )
    path = (tasks[0].folder if len(tasks) == 1 else tasks[0].folder.parent) / "submit" / "job.sbatch"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
    except OSError as error:
        raise UserError(f"run.dir: {path} cannot be written: {error}; name another folder") from error
    job = _sbatch(path, environment)
    many = f", {len(tasks)} tasks" if len(tasks) > 1 else ""
    text = f"submitted job {job}{many}: {path}; output in {path.parent}"
    return {"job": job, "script": str(path), "folders": folders}, text


def _sbatch(path: Path, environment: Mapping[str, str]) -> int:
    """Submit a script; returns the job's number."""
    command = ["sbatch", "--parsable", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip()]
        why = lines[0].rstrip(".") if lines else f"exit {done.returncode}"
        raise UserError(
            f"submit: sbatch refused {path}: {why}; change that option (see `sinfo`), or see the script with --dry-run"
        )
    return int(done.stdout.strip().partition(";")[0])
