"""DeepSpeed's JSON: a shipped or own file, overrides from the recipe, every key checked, batch and precision filled in.

DeepSpeed ignores top-level keys it does not know (a mistyped clipping key leaves clipping at its default of 1.0), so
unknown keys at any depth are errors here, and what the recipe decides cannot be set in the file.
"""

import difflib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from lut_ds.config import RunRecipe
from lut_ds.errors import UserError

# Allowed keys: a dict is a nested section; a type or the allowed values say what DeepSpeed itself would take unseen or end on
# in a stack trace; None leaves the value to DeepSpeed's own check. ds_configs/README.md explains each.
SCHEMA: dict[str, Any] = {
    "zero_optimization": dict.fromkeys(
        [
            "stage",
            "contiguous_gradients",
            "reduce_scatter",
            "reduce_bucket_size",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "allgather_bucket_size",
            "overlap_comm",
            "round_robin_gradients",
            "sub_group_size",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_module_granularity_threshold",
            "zero_hpz_partition_size",
            "zero_quantized_weights",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients",
            "memory_efficient_linear",
        ]
    ),
    "communication_data_type": ("fp32", "bf16", "fp16"),
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "comms_logger": {"enabled": bool, "verbose": bool, "prof_all": bool, "debug": bool, "prof_ops": list},
    "flops_profiler": {
        "enabled": bool,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str,
    },
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
}

# Keys of DeepSpeed that the recipe decides.
OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optim.clip_grad",
    "bf16": "precision.compute",
    "fp16": "precision.compute",
    "torch_autocast": "precision.compute",
    "data_types": "precision.compute",
    "optimizer": "the optim section",
    "scheduler": "the optim section",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "wandb": "run.wandb",
}


def config_folder() -> Path:
    """Folder of the shipped JSON files: inside an installed package, beside it in a checkout."""
    package = Path(str(resources.files("lut_ds")))
    return package / "ds_configs" if (package / "ds_configs").is_dir() else package.parent / "ds_configs"


def load_ds_config(recipe: RunRecipe) -> dict[str, Any]:
    """The file the recipe names with the recipe's overrides, validated; without what the recipe decides.

    Raises:
        UserError: unknown file or key (the nearest valid one is named), a key the recipe decides, a combination that
            trains wrongly.
    """
    name = recipe.train.deepspeed
    shipped = {path.stem: path for path in config_folder().glob("*.json")}
    path = Path(name) if name.endswith(".json") else shipped.get(name)
    if path is None or not path.is_file():
        raise UserError(
            f"train.deepspeed: no DeepSpeed configuration {name!r}; expected a .json file or one of {', '.join(sorted(shipped))}"
        )
    try:
        config = json.loads(path.read_text(), object_pairs_hook=_unique_keys)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a mapping, found {config!r}")
    config = _merge(config, recipe.train.deepspeed_override)
    _check_keys(config, SCHEMA, path.name)
    _check_values(config, recipe, path.name)
    return config


def resolve_ds_config(
    config: dict[str, Any], recipe: RunRecipe, micro_batch: int, accumulation: int, world_size: int
) -> dict[str, Any]:
    """Everything DeepSpeed is given: the validated file plus batch sizes, precision and clipping from the recipe."""
    if zero_stage(config) in (1, 2):
        zero = config["zero_optimization"]
        config = {**config, "zero_optimization": {**zero, "overlap_comm": overlaps(zero, world_size)}}
    resolved = {
        **config,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed clips at 1.0 unless told otherwise.
        "gradient_clipping": recipe.optim.clip_grad or 0.0,
        # Progress and speed are reported by us; DeepSpeed's speed meter waits for the device around every micro-batch.
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
        # GuardedAdamW is torch's AdamW; DeepSpeed's list of tested optimizers compares exact types.
        "zero_allow_untested_optimizer": True,
    }
    if recipe.precision.compute == "bf16":
        # The finite check is ours and stays on the device; DeepSpeed's would wait for the device in every step.
        resolved["bf16"] = {"enabled": True, "check_grad_overflow": False}
        if zero_stage(config) >= 2:
            # Stage 1 would silently become another optimizer with this, so it accumulates micro-batches in bf16.
            resolved["data_types"] = {"grad_accum_dtype": "fp32"}
    return resolved


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ValueError(f"key {twice} is given twice")
    return dict(pairs)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = (
            _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged


def _check_keys(config: dict[str, Any], schema: dict[str, Any], origin: str, prefix: str = "") -> None:
    for key, value in config.items():
        if not prefix and key in OWNED:
            raise UserError(f"DeepSpeed configuration {origin}: {key} is decided by the recipe; set {OWNED[key]} there")
        if key not in schema:
            close = difflib.get_close_matches(key, [*schema, *(OWNED if not prefix else ())], n=1, cutoff=0.5)
            hint = f"; did you mean {prefix}{close[0]}?" if close else f"; known keys: {', '.join(schema)}"
            raise UserError(f"DeepSpeed configuration {origin}: unknown key {prefix}{key}{hint}")
        if isinstance(schema[key], dict):
            if not isinstance(value, dict):
                raise UserError(f"DeepSpeed configuration {origin}: {key}: expected a mapping, found {value!r}")
            _check_keys(value, schema[key], origin, f"{prefix}{key}.")
        elif (expected := _misfit(value, schema[key])) is not None:
            raise UserError(f"DeepSpeed configuration {origin}: {prefix}{key}: expected {expected}, found {value!r}")


def _misfit(value: Any, kind: Any) -> str | None:
    """What was expected, if `value` is not of the kind that SCHEMA names."""
    if isinstance(kind, tuple):
        return None if value in kind else f"one of {', '.join(kind)}"
    flag = isinstance(value, bool)
    fits, expected = {
        None: (True, ""),
        bool: (flag, "true or false"),
        int: (isinstance(value, int) and not flag, "a whole number"),
        float: (isinstance(value, int | float) and not flag and value > 0, "a number above 0"),
        list: (isinstance(value, list | tuple), "a list"),
        str: (isinstance(value, str), "text"),
    }[kind]
    return None if fits else expected


def _check_values(config: dict[str, Any], recipe: RunRecipe, origin: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    zero = config.get("zero_optimization", {})
    try:
        stage = int(DeepSpeedZeroConfig(**zero).stage)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"DeepSpeed configuration {origin}: zero_optimization.{where}: {first['msg']}, found {first.get('input')!r}"
        ) from error
    if zero.get("round_robin_gradients"):
        raise UserError(
            f"DeepSpeed configuration {origin}: zero_optimization.round_robin_gradients must be false: it reorders the shards"
        )
    if stage == 3 and zero.get("memory_efficient_linear", True):
        raise UserError(
            f"DeepSpeed configuration {origin}: zero_optimization.memory_efficient_linear must be false: "
            "it gives wrong gradients with torch.compile"
        )
    if config.get("gradient_predivide_factor", 1.0) != 1.0 and stage > 0 and zero.get("reduce_scatter", True):
        raise UserError(
            f"DeepSpeed configuration {origin}: gradient_predivide_factor other than 1.0 needs "
            "zero_optimization.reduce_scatter=false"
        )
    if stage == 0 and recipe.precision.compute == "bf16":
        raise UserError(
            f"DeepSpeed configuration {origin}: stage 0 with precision.compute=bf16 keeps no fp32 masters; use train.deepspeed=zero1, "
            "or precision.compute=fp32"
        )


def overlaps(zero: Mapping[str, Any], world_size: int) -> bool:
    """Whether stage 1 or 2 sends gradients during the backward pass, given the `zero_optimization` section.

    Not on one rank, which has nothing to send, and would keep a second bucket for it.
    """
    return bool(zero.get("overlap_comm", False)) and world_size > 1


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a validated configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))
