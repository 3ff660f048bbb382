"""What users write, YAML files and `section.key=value` overrides, as a tree of plain values."""

import os
from pathlib import Path
from typing import Any

import yaml

from lut_ds.errors import UserError

# Values that are text whatever they look like: YAML would read 2024 as a number and `/a #b` as /a.
TEXT = ("data.path", "model.source", "run.dir", "run.time_limit", "run.wandb_project", "train.deepspeed")


class UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error: YAML keeps the last and drops the first unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file in which no key may be given twice; UserError, which calls it `what`, if it is not readable."""
    try:
        return yaml.load(path.read_text(), UniqueKeys)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{what} {path}: not readable as YAML: {' '.join(str(error).split())}") from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in a recipe tree; the value is read as YAML."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise UserError(f"override {override!r}: expected section.key=value, e.g. optim.blr=1e-4")
    try:
        plain = key.strip() in TEXT and text.strip() not in ("", "null", "~") and text.strip()[0] not in "'\""
        value = text.strip() if plain else as_number(yaml.load(text, UniqueKeys))  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"override {override!r}: value is not YAML: {' '.join(str(error).split())}") from error
    node = tree
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {part} is a value, not a section")
        node = child
    node[parts[-1]] = value


def coerce(node: Any, where: str = "") -> Any:
    """YAML has no tuples and reads 1e-4 as text: make both what strict validation expects."""
    if isinstance(node, dict):
        return {key: coerce(value, f"{where}.{key}" if where else str(key)) for key, value in node.items()}
    if where in TEXT:
        return os.path.expanduser(node) if isinstance(node, str) else node
    if isinstance(node, list):
        return tuple(coerce(value) for value in node)
    return as_number(node)


def as_number(value: Any) -> Any:
    """A float written without a dot, such as 1e-4, is text to YAML 1.1."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value.lstrip("+-")[:1].isdigit() else value
        except ValueError:
            return value
    return value
