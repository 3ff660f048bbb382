"""Sub-commands around a pre-training run."""

import argparse
import os
from dataclasses import fields

from lut_ds.cli.parser import DONE, STOPPED, Answer, Commands, add_overrides, add_recipe, positive


def pretrain(args: argparse.Namespace) -> Answer:
    """Train, continue or plan a run."""
    from lut_ds.config import load_recipe

    recipe = load_recipe(args.recipe, args.override)
    if args.dry_run:
        os.environ["DS_ACCELERATOR"] = "cpu"  # nothing is put on a device, and the machine that plans may have none
        from lut_ds.engine.plan import describe_plan, plan

        planned = plan(recipe, args.world_size or int(os.environ.get("WORLD_SIZE", "1")))
        return planned, describe_plan(args.recipe, planned), DONE
    from lut_ds.engine.train import pretrain

    outcome = pretrain(recipe, args.recipe)
    ended = f"stopped by {outcome.stopped_by} at" if outcome.stopped_by else "done:"
    text = f"{ended} step {outcome.step} of {outcome.steps}; {outcome.folder}"
    return outcome.as_dict(), text, STOPPED if outcome.stopped_by else DONE


def demo(args: argparse.Namespace) -> Answer:
    """Pre-train a small LUT on handwritten digits and report what it learned."""
    from lut_ds.demo import run_demo

    results, text = run_demo(args.override)
    return results, text, STOPPED if results.get("stopped_by") else DONE


def doctor(args: argparse.Namespace) -> Answer:
    """What works on this machine, and what to do about what does not."""
    if args.cluster:
        from lut_ds.engine.warmup import describe_cluster, examine_cluster

        cluster = examine_cluster()
        return cluster, describe_cluster(cluster), DONE
    from lut_ds.doctor import describe_report, examine

    report = examine()
    return report, describe_report(report), DONE


def submit(args: argparse.Namespace) -> Answer:
    """Write a Slurm batch script for a recipe, or for all runs of a sweep, check it, and submit it."""
    if args.sweep is not None and args.recipe is not None and "=" in args.recipe:
        args.override.insert(0, args.recipe)  # a sweep's YAML file names its recipe: the first word is an override
        args.recipe = None
    environment = dict(os.environ)
    os.environ["DS_ACCELERATOR"] = "cpu"  # of this process, which may be on a machine without a GPU; not of the job
    from lut_ds.engine.submit import submit
    from lut_ds.engine.tasks import Resources

    given = {field.name: getattr(args, field.name) for field in fields(Resources)}
    wanted = Resources(**{key: value for key, value in given.items() if value is not None})
    result, text = submit(args.recipe, args.override, wanted, environment, args.sweep, args.dry_run)
    return result, text, DONE


def recipes(args: argparse.Namespace) -> Answer:
    """The shipped recipes and the first line of each: of pre-training first, then those of other commands."""
    from lut_ds.config import recipe_folder

    files = sorted(recipe_folder().glob("**/*.yaml"), key=lambda path: (path.parent, path.name))
    heads = {path.stem: path.read_text().splitlines()[0].lstrip("# ") for path in files}
    width = max(map(len, heads))
    return heads, "\n".join(f"{name:{width}} {head}" for name, head in heads.items()), DONE


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    sub = commands.add(pretrain)
    add_recipe(sub)
    sub.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    sub.add_argument("--world-size", type=positive, help="ranks to plan for (with --dry-run)")
    add_overrides(commands.add(demo), "the demo recipe")
    sub = commands.add(doctor)
    sub.add_argument(
        "--cluster", action="store_true", help="compare the ranks of a launcher: srun ... lut-ds doctor --cluster"
    )
    _add_submit(commands)
    commands.add(recipes)


def _add_submit(commands: Commands) -> None:
    sub = commands.add(submit)
    sub.add_argument(
        "recipe", nargs="?", help="name of a shipped recipe, or a .yaml file; none with a sweep's YAML file"
    )
    add_overrides(sub)
    sub.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    sub.add_argument("--nodes", type=positive, metavar="N", help="default 1")
    sub.add_argument("--gpus-per-node", type=int, metavar="N", help="default 8; 0 trains on CPUs")
    sub.add_argument("--ranks-per-node", type=positive, metavar="N", help="default: one a GPU, or one")
    sub.add_argument("--cpus-per-task", type=positive, metavar="N", help="CPU cores of a rank")
    for name in ("time", "partition", "account", "qos", "constraint", "job-name"):
        sub.add_argument(f"--{name}", metavar="TEXT", help="as sbatch takes it")
    sub.add_argument(
        "--warn-seconds", type=positive, metavar="S", help="time to save in before the limit (default 180)"
    )
    sub.add_argument("--launcher", metavar="NAME", help="srun (default), torchrun, deepspeed or deepspeed-slurm")
    sub.add_argument("--container", metavar="IMAGE", help="run in this image, with Enroot and Pyxis")
    sub.add_argument(
        "--setup", metavar="FILE", help="shell lines to run first: modules, NCCL settings (launch/network_*.sh)"
    )
    sub.add_argument("--data-on-nodes", action="store_true", help="data.path exists on the nodes only")
    sub.add_argument(
        "--sweep",
        metavar="FILE",
        help="a job array: the YAML file of `lut-ds sweep`, whose table is made by that command afterwards (its --out is run.dir "
        "here), or a line of section.key=value words for each task",
    )
    sub.add_argument(
        "--sbatch", dest="extra", action="append", metavar="OPTION", help="one more option of sbatch; may be repeated"
    )
