"""The recipe: typed sections with documented fields, YAML files, `section.key=value` overrides, clear errors.

Sections are grouped by intent: `model` and `method` say what is learned (`learning.py`), `data` what is read (`images.py`),
`optim` how it is optimised, `train` how long and how it is distributed, `precision` in which numbers (`training.py`), `guard`
what watches it, `run` where it goes (`running.py`).
"""

from lut_ds.config.files import find_recipe, load_recipe, load_sections, recipe_folder, shipped_recipes
from lut_ds.config.images import Data, ImageData
from lut_ds.config.learning import Method, Model
from lut_ds.config.parse import parse_recipe, parse_sections, recipe_keys
from lut_ds.config.recipe import Reading, Recipe, RunRecipe
from lut_ds.config.running import Guard, Run
from lut_ds.config.section import Area, Decay, Fraction, Positive, Section, Strength
from lut_ds.config.training import AdamW, Batches, Optim, Precision, Train
from lut_ds.config.values import apply_override, load_yaml

__all__ = [
    "AdamW",
    "Area",
    "Batches",
    "Data",
    "Decay",
    "Fraction",
    "Guard",
    "ImageData",
    "Method",
    "Model",
    "Optim",
    "Positive",
    "Precision",
    "Reading",
    "Recipe",
    "Run",
    "RunRecipe",
    "Section",
    "Strength",
    "Train",
    "apply_override",
    "find_recipe",
    "load_recipe",
    "load_sections",
    "load_yaml",
    "parse_recipe",
    "parse_sections",
    "recipe_folder",
    "recipe_keys",
    "shipped_recipes",
]
