"""The recipe: typed sections with documented fields, YAML files, `section.key=value` overrides, clear errors.

Sections are grouped by intent: `model` and `method` say what is learned, `data` what is read, `optim` how it is
optimised, `train` how long and how it is distributed, `precision` in which numbers, `guard` what watches it, `run` where it goes.
"""

import difflib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lut_ds.durations import seconds_of
from lut_ds.errors import UserError
from lut_ds.method.degradations import make_degradation
from lut_ds.method.masking import keep_count
from lut_ds.method.posembed import Positions

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
Area = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Model(Section):
    """Shape of the encoder and decoder."""

    image_size: Positive = 224
    """Side of a view, pixels."""
    patch_size: Positive = 16
    """Side of a patch, pixels."""
    width: Positive = 768
    """Encoder embedding width D."""
    depth: Positive = 12
    """Encoder blocks."""
    heads: Positive = 12
    """Encoder attention heads."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of the encoder's and decoder's MLPs over their width."""
    decoder_width: Positive = 512
    """Decoder embedding width."""
    decoder_depth: Positive = 8
    """Decoder blocks."""
    decoder_heads: Positive = 16
    """Decoder attention heads."""
    positions: Positions = "sincos_2d"
    """Fixed positions of encoder and decoder: `sincos_2d` (MAE, LUT), or `sinusoid_1d` over the raster index (Beyond Masking)."""

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """L, patches of an image."""
        return self.grid**2

    @property
    def patch_dim(self) -> int:
        """P*P*3, values of a patch."""
        return self.patch_size**2 * 3

    @model_validator(mode="after")
    def _fits(self) -> "Model":
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}; change one of them"
            )
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, prefix + "width"), getattr(self, prefix + "heads")
            if width % heads:
                raise ValueError(f"{prefix}width {width} is not divisible by {prefix}heads {heads}; change one of them")
            if width % 4:
                raise ValueError(f"{prefix}width {width} is not divisible by 4, which sine-cosine positions need")
        return self


class Method(Section):
    """What is learned."""

    name: Literal["lut", "mae"] = "lut"
    """`lut`: two views and an EMA teacher; `mae`: one view, no teacher."""
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Share of hidden patches of each view; 0, with a degradation only: none."""
    degradation: str = "none"
    """What else is taken from the student's views: none, or the name of a file of `lut_ds/method/degradations`."""
    degradation_params: dict[str, float | str] = Field(default_factory=dict)
    """Parameters of the degradation that differ from its defaults."""
    norm_pix: bool = True
    """Normalise each target patch by its own mean and variance."""
    w_mae: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the reconstruction loss."""
    w_bc: Annotated[float, Field(ge=0)] = 0.25
    """Weight of the broader-contextualization loss."""
    projector_depth: Annotated[int, Field(ge=0)] = 2
    """Linear layers of the projector (0: identity)."""
    predictor_depth: Annotated[int, Field(ge=0)] = 2
    """Linear layers of the predictor (0: identity)."""
    head_hidden: Positive = 4096
    """Hidden width of both heads."""
    head_norm: Literal["bn", "ln", "none"] = "bn"
    """Norm inside the heads; `bn` is synchronised across ranks."""
    head_act: Literal["relu", "gelu"] = "relu"
    """Activation inside the heads."""
    ema_decay: Fraction = 0.996
    """EMA decay at the first step; a half cosine takes it to `ema_decay_end` at the end of the run."""
    ema_decay_end: Fraction = 1.0
    """EMA decay at the end; with both 0 the teacher is the student of the step before, without an average."""

    @property
    def views(self) -> int:
        """Views of each image that a step reads."""
        return 2 if self.name == "lut" else 1


class ImageData(Section):
    """How images are read, in pre-training and in fine-tuning."""

    path: str | None = None
    """Image folder (DIR/train/<class>/*.jpg, DIR/<class>/*.jpg or DIR/*.jpg), folder or pattern of .tar shards, index (.lut),
    list of files (.txt, .lst), or a source of your own: package.module:factory?argument."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip, drawn for each view."""
    crop_scale: tuple[Area, Area] = (0.2, 1.0)
    """Area range of RandomResizedCrop (with `random_resized_crop`, MAE's view)."""
    threads: Positive | None = None
    """Decoding threads of each rank; null: what `lut-ds bench loader --tune` found for this machine, else its cores, at most 8."""
    prefetch: Positive | None = None
    """Micro-batches prepared ahead; null: as tuned, else 2."""
    hw_decoder_load: Fraction | None = None
    """Share of the JPEGs that a GPU's hardware decoder takes, where it has one; null: as tuned, else 0.65."""
    max_bad_share: Fraction = 0.01
    """Stop when more of the samples seen than this, or of 1,000 if that is more, cannot be read or decoded."""
    retry_seconds: Annotated[float, Field(ge=0, le=1200)] = 300.0
    """How long to wait for a data set of which nothing can be read, seconds; the other ranks wait too: stay below guard.hang_seconds."""

    @field_validator("crop_scale")
    @classmethod
    def _rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"expected [smallest, largest], found {list(value)}; swap them")
        return value


class Data(ImageData):
    """What is read, and how views are drawn from it."""

    shuffle: Literal["global", "blocks"] = "global"
    """Order of an epoch: `global` any sample at any time; `blocks` nearly sequential reads, for storage that needs them."""
    shuffle_block: Positive = 256
    """With `blocks`: neighbouring samples that are kept near each other."""
    shuffle_window: Positive = 256
    """With `blocks`: blocks whose samples are shuffled among themselves; batches mix no more than these."""
    crop: Literal["method", "resize_crop", "random_resized_crop"] = "method"
    """How views are cut: `resize_crop` whole, padded and cropped (LUT); `random_resized_crop` (MAE); `method`: as its method does."""
    crop_pad: Annotated[int, Field(ge=0)] = 4
    """Reflect padding before the random crop, pixels (with `resize_crop`)."""
    jitter: tuple[Strength, Strength, Strength, Annotated[float, Field(ge=0, le=0.5)]] = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast, saturation and hue strengths of view 2."""
    jitter_prob: Fraction = 0.8
    """Probability of the colour jitter of view 2."""
    photometric: bool | Literal["both"] = True
    """Colour jitter and one of gray, solarize and blur on view 2; `both`: on view 1 too, which is also what is reconstructed."""


class AdamW(Section):
    """The optimizer, whatever its schedule."""

    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's moment decays."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay; none on 1-D tensors and biases."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Clip the gradient's L2 norm to this; null: no clipping (as the references)."""


class Optim(AdamW):
    """How it is optimised: AdamW, linear warm-up from 0, then a half cosine by fractional epoch."""

    blr: Annotated[float, Field(ge=0)] = 1.5e-4
    """Base learning rate; `lr_rule` makes the peak from it."""
    lr_rule: Literal["sqrt", "linear"] = "sqrt"
    """Peak: `sqrt` blr*sqrt(global_batch)/4 (LUT's code), `linear` blr*global_batch/256 (MAE)."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 40.0
    """Epochs of linear warm-up."""


class Batches(Section):
    """In which batches, and how they are distributed. Below `global_batch`, nothing should change results."""

    global_batch: Positive = 4096
    """Images an optimizer step, over all ranks and accumulation."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps; schedules keep their length."""
    micro_batch: Positive | None = None
    """Images a rank and forward pass; null: global_batch / world size. Accumulation follows from it."""
    deepspeed: str = "zero1"
    """Name of a file in ds_configs, or a path."""
    deepspeed_override: dict[str, Any] = Field(default_factory=dict)
    """Keys merged over that file."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile of the blocks (with ZeRO-3 the teacher's only); `auto`: on a GPU."""

    @model_validator(mode="after")
    def _divides(self) -> "Batches":
        if self.micro_batch is not None and self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.micro_batch {self.micro_batch} does not divide train.global_batch {self.global_batch}; change one of them"
            )
        return self


class Train(Batches):
    """How long, in which batches, and how it is distributed."""

    epochs: Positive = 1600
    """Length of the schedules, epochs."""
    overlap_teacher: bool = False
    """On a GPU, run the teacher's pass on a stream of its own, beside the student's; takes more memory. Not measured yet."""


class Precision(Section):
    """In which numbers."""

    compute: Literal["fp32", "bf16"] = "bf16"
    """Student's weights and activations; masters, moments and EMA are fp32 always."""
    teacher: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Teacher's replica and activations; `fp8`: e4m3 in its blocks' linear layers, bf16 elsewhere (from Ada and Hopper on)."""


class Run(Section):
    """Where it goes and how it is watched."""

    dir: str | None = None
    """Run folder; null: runs/<recipe>. A folder that holds a run of the same recipe is continued."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initialisation, order, views and masks."""
    deterministic: bool = False
    """On a GPU, only kernels that repeat to the bit (slower; an operator that has none is an error). CPUs always repeat."""
    warmup_checks: bool = True
    """With several ranks, compare them before the first step: software, code, recipe, clocks, data, links (about a second)."""
    log_every: Positive = 10
    """Steps between writes of metrics (every step is recorded)."""
    save_every: Positive | None = None
    """Steps between checkpoints; null: every epoch."""
    async_save: bool = True
    """Write checkpoints beside the steps, which stand still for a copy to host memory only (as large as the checkpoint)."""
    time_limit: str | None = "auto"
    """Save and stop before this: a duration of this process ([D-]HH:MM:SS), `auto`: the end of the Slurm job, null: never."""
    stop_margin: Annotated[float, Field(ge=0)] = 120.0
    """Seconds kept free before the time limit, beyond what steps and saves were measured to take."""
    stop_signals: tuple[Literal["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP", "SIGXCPU"], ...] = (
        "SIGTERM",
        "SIGUSR1",
        "SIGUSR2",
        "SIGINT",
    )
    """Signals to a rank that save and stop the run; leave out what another library of yours uses."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_every_epochs: Positive | None = 100
    """Checkpoints at multiples of this epoch are kept for ever."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Mirror metrics to Weights & Biases; it can neither stop nor slow a run."""
    wandb_project: str = "lut_ds"
    """Project on Weights & Biases."""

    @field_validator("time_limit", mode="before")
    @classmethod
    def _duration(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # to YAML 1.1, 23:30:00 is a number: 84600
        if isinstance(value, str) and value != "auto" and not seconds_of(value):
            raise ValueError(f"expected auto, null or [D-]HH:MM:SS, found {value!r}")
        return value

    @field_validator("wandb", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # `off` is a boolean to YAML 1.1


class Guard(Section):
    """What watches a run, and what it does about what it finds. All may change when a run is continued."""

    max_bad_steps: Positive = 10
    """Steps in a row that were not applied (loss or gradient not finite, or a spike) until the run stops."""
    spike: Literal["off", "log", "skip", "rewind"] = "log"
    """A step whose loss is far above the last ones: say so; or do not apply it; or go back to the last checkpoint before it
    and pass over the data in between."""
    spike_window: Annotated[int, Field(ge=8)] = 128
    """Applied steps that say what is usual; before as many there is no spike."""
    spike_sigmas: Annotated[float, Field(gt=0)] = 8.0
    """Rise over their median that is a spike, in robust standard deviations (1.4826 MAD); at least 5 % of the median."""
    max_rewinds: Annotated[int, Field(ge=0)] = 3
    """Rewinds until the run stops."""
    hash_every: Positive | None = 500
    """Steps between comparisons of the ranks' weights and buffers, which every save makes too; null: never."""
    hang_seconds: Annotated[float, Field(gt=0)] | None = 600.0
    """Time without a step until the run counts as hanging (3 times that for the first step and in a save); null: never."""
    straggler_factor: Annotated[float, Field(gt=1)] | None = 1.5
    """A rank this many times slower than the median is named after three flushes; null: never."""
    memory_growth: Annotated[float, Field(gt=0)] | None = 0.2
    """Steady growth of a rank's memory that is said, as a share; null: never."""

    @field_validator("spike", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # `off` is a boolean to YAML 1.1


class Recipe(Section):
    """A whole run."""

    model: Model = Field(default_factory=Model)
    method: Method = Field(default_factory=Method)
    data: Data = Field(default_factory=Data)
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(default_factory=Train)
    precision: Precision = Field(default_factory=Precision)
    guard: Guard = Field(default_factory=Guard)
    run: Run = Field(default_factory=Run)

    @property
    def view_side(self) -> int:
        """Side of the views that are read, pixels: `model.image_size` unless a degradation reads another."""
        degradation = make_degradation(self.method.degradation, self.method.degradation_params)
        side = self.model.image_size
        return side if degradation is None else degradation.view_side(side)

    @property
    def crop(self) -> Literal["resize_crop", "random_resized_crop"]:
        """How views are cut: `data.crop`, or the method's own way."""
        if self.data.crop != "method":
            return self.data.crop
        return "random_resized_crop" if self.method.name == "mae" else "resize_crop"

    @model_validator(mode="after")
    def _combine(self) -> "Recipe":
        views, patches = self.method.views, self.model.patches
        keep = keep_count(patches, self.method.mask_ratio)
        try:
            view_side = self.view_side
        except ValueError as error:
            raise ValueError(f"method.degradation: {error}") from None
        if self.method.mask_ratio == 0 and self.method.degradation == "none":
            raise ValueError(
                "method.mask_ratio 0 leaves nothing to predict; raise it, or set method.degradation, e.g. to distorted"
            )
        if views == 2 and 0 < self.method.mask_ratio < 0.5:
            raise ValueError(
                f"method.mask_ratio {self.method.mask_ratio} is below 0.5: the two views' visible patches could not be disjoint"
            )
        if keep < 1:
            raise ValueError(
                f"method.mask_ratio {self.method.mask_ratio} leaves no visible patch of {patches}; lower it"
            )
        if self.crop == "resize_crop" and self.data.crop_pad >= view_side:
            side = "model.image_size" if view_side == self.model.image_size else "the degradation's view side"
            raise ValueError(
                f"data.crop_pad {self.data.crop_pad} is not below {side} {view_side}, which reflection needs; lower it"
            )
        hidden = int(self.model.width * self.model.mlp_ratio)
        if self.precision.teacher == "fp8" and (self.model.width % 16 or hidden % 16):
            raise ValueError(
                f"precision.teacher fp8 needs model.width and model.width*mlp_ratio divisible by 16, found {self.model.width} and "
                f"{hidden}; change them, or use precision.teacher=bf16"
            )
        if self.optim.warmup_epochs >= self.train.epochs and self.optim.warmup_epochs > 0:
            raise ValueError(
                f"optim.warmup_epochs {self.optim.warmup_epochs} is not below train.epochs {self.train.epochs}; change one of them"
            )
        return self


class Reading(Protocol):
    """What the loop reads of a recipe's `data`."""

    @property
    def max_bad_share(self) -> float: ...


class RunRecipe(Protocol):
    """What the engine reads of any recipe, whatever is learned."""

    @property
    def data(self) -> Reading: ...
    @property
    def optim(self) -> AdamW: ...
    @property
    def train(self) -> Batches: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def guard(self) -> Guard: ...
    @property
    def run(self) -> Run: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...
    def model_dump_json(self) -> str: ...


S = TypeVar("S", bound=Section)


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error: YAML keeps the last and drops the first unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def recipe_folder() -> Path:
    """Folder of the shipped recipes."""
    return Path(str(resources.files("lut_ds"))) / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes."""
    return _shipped(recipe_folder())


def _shipped(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path and apply `section.key=value` overrides.

    Raises:
        UserError: unknown recipe or key (the nearest valid one is named), wrong type, impossible combination.
    """
    return load_sections(Recipe, name_or_path, overrides, recipe_folder())


def load_sections(kind: type[S], name_or_path: str, overrides: Sequence[str], folder: Path) -> S:
    """As `load_recipe`, for any kind of recipe; `folder` holds those that are known by name."""
    path = find_recipe(name_or_path, folder)
    tree = load_yaml(path, "recipe")
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path}: expected a mapping of sections, found {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    return parse_sections(kind, tree, str(path.name))


def load_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file in which no key may be given twice; UserError, which calls it `what`, if it is not readable."""
    try:
        return yaml.load(path.read_text(), _UniqueKeys)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{what} {path}: not readable as YAML: {' '.join(str(error).split())}") from error


def find_recipe(name_or_path: str, folder: Path | None = None) -> Path:
    """Path of a recipe given as a file or as the name of a shipped one (in `folder`; None: for pre-training)."""
    folder = recipe_folder() if folder is None else folder
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not os.path.isfile(path):  # False too for names that no file system takes
            raise UserError(f"recipe {path}: no such file; `lut-ds recipes` lists the shipped ones")
        return path
    shipped = folder / f"{name_or_path}.yaml"
    if not os.path.isfile(shipped):
        listed = folder == recipe_folder()
        known = "`lut-ds recipes` lists them" if listed else f"there are {', '.join(_shipped(folder))}"
        raise UserError(f"recipe {name_or_path}: no such recipe{_nearest(name_or_path, _shipped(folder))}; {known}")
    return shipped


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in a recipe tree; the value is read as YAML."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise UserError(f"override {override!r}: expected section.key=value, e.g. optim.blr=1e-4")
    try:
        plain = key.strip() in TEXT and text.strip() not in ("", "null", "~") and text.strip()[0] not in "'\""
        value = text.strip() if plain else _number(yaml.load(text, _UniqueKeys))  # noqa: S506 - a SafeLoader
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


def parse_recipe(tree: dict[str, Any], origin: str) -> Recipe:
    """Validate a recipe tree; `origin` names it in errors."""
    return parse_sections(Recipe, tree, origin)


def parse_sections(kind: type[S], tree: dict[str, Any], origin: str) -> S:
    """As `parse_recipe`, for any kind of recipe."""
    try:
        return kind.model_validate(_coerce(tree))
    except RecursionError:
        raise UserError(f"recipe {origin}: contains itself, or is nested too deeply; write it flat") from None
    except ValidationError as error:
        raise UserError(f"recipe {origin}: {_describe(kind, error.errors()[0])}") from None


def recipe_keys(kind: type[Section] = Recipe) -> list[str]:
    """Every valid `section.key`."""
    sections = {name: field.annotation for name, field in kind.model_fields.items()}
    return [f"{name}.{key}" for name, section in sections.items() for key in section.model_fields]  # type: ignore[union-attr]


def _coerce(node: Any, where: str = "") -> Any:
    """YAML has no tuples and reads 1e-4 as text: make both what strict validation expects."""
    if isinstance(node, dict):
        return {key: _coerce(value, f"{where}.{key}" if where else str(key)) for key, value in node.items()}
    if where in TEXT:
        return os.path.expanduser(node) if isinstance(node, str) else node
    if isinstance(node, list):
        return tuple(_coerce(value) for value in node)
    return _number(node)


# Values that are text whatever they look like: YAML would read 2024 as a number and `/a #b` as /a.
TEXT = ("data.path", "model.source", "run.dir", "run.time_limit", "run.wandb_project", "train.deepspeed")


def _number(value: Any) -> Any:
    """A float written without a dot, such as 1e-4, is text to YAML 1.1."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value.lstrip("+-")[:1].isdigit() else value
        except ValueError:
            return value
    return value


def _describe(kind: type[Section], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if part not in ("bool", "int"))
    found = error.get("input")
    if error["type"] == "extra_forbidden":
        sections = {name: field.annotation.model_fields for name, field in kind.model_fields.items()}  # type: ignore[union-attr]
        owners = [name for name, fields in sections.items() if isinstance(found, dict) and set(found) <= set(fields)]
        candidates = recipe_keys(kind) if "." in where else owners or list(sections)
        return f"unknown key {where}{_nearest(where, candidates)}"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}" if where else str(error["ctx"]["error"])
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, found {found!r}"


def _nearest(name: str, candidates: Sequence[str]) -> str:
    section, _, key = name.rpartition(".")
    close = [c for c in candidates if section and c.rpartition(".")[2] == key][:1]  # a right key in a wrong section
    if not close:
        close = difflib.get_close_matches(name.lower(), candidates, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
