"""A sweep: a YAML file that names a recipe, what is changed in it run by run, and seeds, resolved to the recipes of all runs.

recipe: lut_vits16               # a shipped recipe, or a file beside this one
overrides: {train.epochs: 100}   # of all runs
seeds: [0, 1, 2]                 # default: 0
runs:                            # by name; each may have seeds of its own
  mae: {method.name: mae}
  lut: {}
grid: {optim.blr: [1e-4, 3e-4]}  # every combination, of each run where there are any
evaluate: [knn, probe]           # default
pixels: true                     # raw pixels too, with knn and probe; default: false
"""

import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lut_ds.config import Recipe, load_recipe, load_yaml
from lut_ds.errors import UserError

EVALUATIONS = ("knn", "probe", "attention_distance", "spectrum")
_KEYS = ("recipe", "overrides", "seeds", "runs", "grid", "evaluate", "pixels")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
_OURS = ("run.dir", "run.seed")
_LONGEST = 200  # letters of a name, which becomes that of a folder and of a log
_MOST = 10_000  # names: a grid grows quickly, and every recipe is read before the first run starts


@dataclass(frozen=True)
class Entry:
    """One run: `name` and `seed` in its sweep, its recipe, and the words after `lut-ds pretrain` that start it alone."""

    name: str
    seed: int
    recipe: Recipe
    words: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Its run folder."""
        assert self.recipe.run.dir is not None
        return Path(self.recipe.run.dir)

    @property
    def title(self) -> str:
        """Name and seed, for people."""
        return f"{self.name}, seed {self.seed}"


@dataclass(frozen=True)
class SweepFile:
    """What a sweep file says: the runs in order (a name's seeds together), which evaluations, whether raw pixels too."""

    path: Path
    entries: tuple[Entry, ...]
    evaluate: tuple[str, ...]
    pixels: bool

    @property
    def names(self) -> list[str]:
        """The runs' names, without their seeds, in order."""
        return list(dict.fromkeys(entry.name for entry in self.entries))


def read_sweep(path: Path, out: Path, overrides: Sequence[str] = ()) -> SweepFile:
    """Read a sweep file and resolve every run's recipe.

    Args:
        out: folder of the sweep; runs go to `runs/NAME/seed_N` below it.
        overrides: `section.key=value`, over all that the file says.

    Raises:
        UserError: one line: the key, what was expected there, and what was found.
    """
    for word in overrides:
        if word.startswith(tuple(f"{key}=" for key in _OURS)):
            key = word.partition("=")[0]
            raise UserError(f"{key}: a sweep sets it for each run; name the folder with --out, seeds in the file")
    tree = _section(load_yaml(path, "sweep"), str(path))
    unknown = next((key for key in tree if key not in _KEYS), None)
    if unknown is not None:
        raise UserError(f"sweep {path}: {unknown}: expected one of {', '.join(_KEYS)}; correct the key")
    recipe = _recipe(tree.get("recipe"), path)
    common = _changes(tree.get("overrides"), f"sweep {path}: overrides")
    seeds = _seeds(tree.get("seeds", [0]), f"sweep {path}: seeds")
    entries = []
    for name, (changes, own) in _named(tree, path).items():
        for seed in own or seeds:
            folder = out / "runs" / name / f"seed_{seed}"
            words = [*_words({**common, **changes}), *overrides, f"run.seed={seed}", f"run.dir={folder}"]
            try:
                entries.append(_entry(name, seed, recipe, words))
            except UserError as error:
                raise UserError(f"sweep {path}: runs.{name}: {error}") from None
    evaluate = tuple(_list(tree.get("evaluate", ["knn", "probe"]), f"sweep {path}: evaluate"))
    for found in evaluate:
        if found not in EVALUATIONS:
            raise UserError(f"sweep {path}: evaluate: expected some of {', '.join(EVALUATIONS)}, found {found!r}")
    pixels = tree.get("pixels", False)
    if not isinstance(pixels, bool):
        raise UserError(f"sweep {path}: pixels: expected true or false, found {pixels!r}")
    return SweepFile(path, tuple(entries), evaluate, pixels)


def _entry(name: str, seed: int, recipe: str, words: Sequence[str]) -> Entry:
    """A run, which names its images absolutely: the sweep may go on in another folder."""
    found = load_recipe(recipe, words)
    path = found.data.path
    # What is not there may be shards by pattern, a module, or a mistake.
    if path is None or os.path.isabs(path) or not os.path.lexists(path):
        return Entry(name, seed, found, (recipe, *words))
    path = os.path.abspath(path)
    found = found.model_copy(update={"data": found.data.model_copy(update={"path": path})})
    return Entry(name, seed, found, (recipe, *words, f"data.path={json.dumps(path)}"))


def _recipe(value: Any, path: Path) -> str:
    if not isinstance(value, str):
        raise UserError(f"sweep {path}: recipe: expected a recipe's name or file, found {value!r}; name one")
    return str((path.parent / value).absolute()) if value.endswith((".yaml", ".yml")) else value


def _named(tree: Mapping[str, Any], path: Path) -> dict[str, tuple[dict[str, Any], list[int] | None]]:
    """Changes and own seeds by the runs' names: those of `runs`, each at every point of `grid`."""
    runs = _section(tree.get("runs"), f"{path}: runs")
    grid = _section(tree.get("grid"), f"{path}: grid")
    if not runs and not grid:
        raise UserError(f"sweep {path}: runs: expected runs by name, or a grid, found neither; add one")
    axes = [[(key, v) for v in _list(values, f"sweep {path}: grid.{key}")] for key, values in grid.items()]
    count = math.prod(map(len, axes)) * max(len(runs), 1)
    if count > _MOST:
        raise UserError(f"sweep {path}: grid: expected at most {_MOST} runs, found {count}; take fewer values")
    named: dict[str, tuple[dict[str, Any], list[int] | None]] = {}
    for name, content in (runs or {"": {}}).items():
        where = f"sweep {path}: runs.{name}"
        section = dict(_section(content, f"{path}: runs.{name}"))
        own = _seeds(section.pop("seeds"), f"{where}.seeds") if "seeds" in section else None
        if twice := grid.keys() & section.keys():
            raise UserError(f"{where}: {min(twice)} is in the grid too; give it in one of the two")
        for point in itertools.product(*axes):
            label = "_".join([*([name] if name else []), *(_label(key, value) for key, value in point)])
            if not _NAME.fullmatch(label):
                raise UserError(f"{where}: expected a name of letters, digits and ._=+-, found {label!r}; rename it")
            if len(label) > _LONGEST:
                raise UserError(
                    f"{where}: expected a name of at most {_LONGEST} letters, found {len(label)}: {label[:40]}...; take fewer or "
                    "shorter values of the grid"
                )
            if label in named:
                raise UserError(f"{where}: {label!r} names two runs; rename one")
            named[label] = (_changes({**section, **dict(point)}, where), own)
    return named


def _label(key: str, value: Any) -> str:
    return f"{key.rpartition('.')[2]}={re.sub('[^A-Za-z0-9.+-]+', '-', str(value)).strip('-')}"


def _changes(value: Any, where: str) -> dict[str, Any]:
    """Overrides by dotted key."""
    found = _section(value, where.removeprefix("sweep "))
    for key in found:
        if "." not in key:
            raise UserError(f"{where}: expected section.key, such as optim.blr, found {key!r}; write the whole key")
        if key in _OURS:
            raise UserError(f"{where}: {key}: a sweep sets it for each run; leave it out")
    return dict(found)


def _words(changes: Mapping[str, Any]) -> list[str]:
    """As on the command line; JSON is YAML, and keeps what is text text."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in changes.items()]


def _seeds(value: Any, where: str) -> list[int]:
    found = _list(value, where)
    if not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in found):
        raise UserError(f"{where}: expected whole numbers from 0, found {found!r}")
    if len(set(found)) < len(found):
        raise UserError(f"{where}: expected each seed once, found {found!r}")
    return found


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected a list, found {value!r}; write it as [a, b]")
    return value


def _section(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"sweep {where}: expected a mapping of names, found {value!r}")
    strange = next((key for key in value if not isinstance(key, str)), None)
    if strange is not None or None in value:
        raise UserError(f"sweep {where}: expected names that are text, found {strange!r}; put it in quotes")
    return value
