"""Where a run goes, what is kept of it, and what watches it: the sections `run` and `guard`."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lut_ds.config.section import Positive, Section
from lut_ds.durations import seconds_of


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
