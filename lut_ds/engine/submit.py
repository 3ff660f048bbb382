"""Slurm jobs of pre-trainings: the batch script, and its way to sbatch."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from lut_ds.config import Recipe
from lut_ds.engine.tasks import Job, Resources, Task, plan_job
from lut_ds.errors import UserError

WARNING = "USR1"  # from Slurm to the batch script alone, which traps it; the ranks get `stop_signal`


def script_folder() -> Path:
    """Folder of the shipped batch scripts: inside an installed package, beside it in a checkout."""
    package = Path(str(resources.files("lut_ds")))
    return package / "launch" if (package / "launch").is_dir() else package.parent / "launch"


def render(job: Job, wanted: Resources, name: str) -> str:
    """The batch script: options, settings of this job, and the body that all scripts share (launch/job.sh).

    Raises:
        UserError: a value that an `#SBATCH` line cannot hold, or a setup file that cannot be read.
    """
    pattern, last = "%A_%a" if len(job.tasks) > 1 else "%j", len(job.tasks) - 1
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
        "array": f"0-{last}" if last else None,
        "signal": f"B:{WARNING}@{wanted.warn_seconds}",
        "open-mode": "append",
        "chdir": Path.cwd(),
        "output": f"{str(job.home).replace('%', '%%')}/submit/slurm-{pattern}.out",
    }
    header = [f"#SBATCH --{key}={_sbatch_value(key, value)}" for key, value in options.items() if value is not None]
    header += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in wanted.extra)]
    sections = ["#!/bin/bash", *header, "", *_settings(job, wanted), "", (script_folder() / "job.sh").read_text()]
    return "\n".join(sections)


def _settings(job: Job, wanted: Resources) -> list[str]:
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
        mounts = sorted({"/dev/shm", str(Path.cwd()), *(str(p) for task in job.tasks for p in _seen(task))})
        options = [f"--container-image={wanted.container}", f"--container-mounts={','.join(mounts)}"]
        options += [f"--container-workdir={Path.cwd()}", "--no-container-mount-home"]
        lines.append(f"srun_options=({shlex.join(options)})")
    if any(task.folder != job.home for task in job.tasks):
        number = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if len(job.tasks) > 1 else "$SLURM_JOB_ID"
        lines.append(f'task_log={shlex.quote(str(job.home))}/submit/slurm-"{number}".out')
    own = [f"stop_signal={stop_signal(task.recipe)} arguments=({shlex.join(task.arguments)})" for task in job.tasks]
    if len(job.tasks) == 1:
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
        recipe_name, overrides, sweep: see `plan_job`.
        wanted: what is asked of Slurm.
        environment: what the job starts with, as sbatch passes its own on.
        dry_run: write and submit nothing.

    Returns:
        (result, text): the job's number, script and run folders, for `--json` and for people. Of a dry run the
        text is the script.

    Raises:
        UserError: see `plan_job` and `render`; no sbatch here, or sbatch refused the script.
    """
    planned = plan_job(recipe_name, overrides, sweep, wanted)
    script = render(planned, wanted, Path(recipe_name or str(sweep)).stem)
    folders = [str(task.folder) for task in planned.tasks]
    if dry_run:
        return {"job": None, "script": script, "folders": folders}, script.rstrip("\n")
    if shutil.which("sbatch") is None:
        raise UserError(
            "submit: no sbatch on this machine; run it on a login node of the cluster, or see the script with --dry-run"
        )
    path = planned.home / "submit" / "job.sbatch"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
    except OSError as error:
        raise UserError(f"run.dir: {path} cannot be written: {error}; name another folder") from error
    job = _sbatch(path, environment)
    many = f", {len(folders)} tasks" if len(folders) > 1 else ""
    without = f" ({planned.left_out} runs are trained already)" if planned.left_out else ""
    text = f"submitted job {job}{many}{without}: {path}; output in {path.parent}"
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
