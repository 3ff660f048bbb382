"""Sub-commands around a pre-training run."""

import argparse
import os

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
    from lut_ds.doctor import describe_report, examine

    report = examine()
    return report, describe_report(report), DONE


def recipes(args: argparse.Namespace) -> Answer:
    """The shipped recipes and the first line of each."""
    from lut_ds.config import recipe_folder, shipped_recipes

    heads = {
        name: (recipe_folder() / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ") for name in shipped_recipes()
    }
    width = max(map(len, heads))
    return heads, "\n".join(f"{name:{width}} {head}" for name, head in heads.items()), DONE


def add(commands: Commands) -> None:
    """Add this group's sub-commands."""
    sub = commands.add(pretrain)
    add_recipe(sub)
    sub.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    sub.add_argument("--world-size", type=positive, help="ranks to plan for (with --dry-run)")
    add_overrides(commands.add(demo), "the demo recipe")
    commands.add(doctor)
    commands.add(recipes)
