"""What fits: the largest micro-batch of each ZeRO stage, and the fastest way to run a recipe on some GPUs."""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

from lut_ds.bench.planner.devices import usable_bytes
from lut_ds.bench.planner.timing import Cluster, StepTime, step_time
from lut_ds.config import Recipe
from lut_ds.engine.activations import with_checkpointing
from lut_ds.engine.ds_config import load_ds_config, zero_stage
from lut_ds.engine.memory import Memory, memory
from lut_ds.engine.step import check_batch_norm
from lut_ds.errors import UserError

STAGES = (0, 1, 2, 3)
MOST = 1 << 20  # images of a micro-batch
CLOSE = 1.02  # a higher stage has to be faster than this to be worth it
FIXABLE = ("train.deepspeed", "train.micro_batch", "train.activation_checkpointing")


@dataclass(frozen=True)
class Way:
    """One way to run a recipe: its stage, micro-batch and checkpointing, and what that takes."""

    recipe: Recipe
    config: dict[str, Any]
    micro_batch: int
    accumulation: int
    memory: Memory
    time: StepTime
    written: Recipe  # before anything was chosen

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return zero_stage(self.config)

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are recomputed."""
        return self.recipe.train.activation_checkpointing

    def words(self) -> str:
        """For a sentence, as overrides of the recipe."""
        given = self.written.train
        own = zero_stage(load_ds_config(self.written)) == self.stage
        words = [f"train.deepspeed={given.deepspeed if own else f'zero{self.stage}'}"]
        if not own and given.deepspeed_override:
            words.append("train.deepspeed_override={}")
        words.append(f"train.micro_batch={self.micro_batch}")
        if self.checkpointing or given.activation_checkpointing:
            words.append(f"train.activation_checkpointing={str(self.checkpointing).lower()}")
        return " ".join(words)


class Fitter:
    """Ways to run a recipe on a cluster.

    Args:
        recipe: any.
        cluster: GPUs.
        mfu: utilisation that is assumed or was measured.
        fixed: keys of FIXABLE that the user set, and that are kept.
    """

    def __init__(self, recipe: Recipe, cluster: Cluster, mfu: float, fixed: Set[str] = frozenset()) -> None:
        self.recipe, self.cluster, self.mfu, self.fixed = recipe, cluster, mfu, fixed
        self.usable = usable_bytes(cluster.device)
        self.share = recipe.train.global_batch // cluster.gpus
        self._configs: dict[int, dict[str, Any]] = {}

    def way(self, stage: int, micro_batch: int, checkpointing: bool) -> Way:
        """That way, whether it fits or not; stage 0 only in fp32."""
        recipe, config = self._at(stage, checkpointing)
        accumulation = self.share // micro_batch
        held = memory(recipe, config, self.cluster.gpus, micro_batch, accumulation)
        return Way(
            recipe,
            config,
            micro_batch,
            accumulation,
            held,
            step_time(recipe, config, self.cluster, micro_batch, accumulation, self.mfu),
            self.recipe,
        )

    def fits(self, way: Way) -> bool:
        """Whether its peak is within what the device has to give."""
        return way.memory.peak <= self.usable

    def largest(self, stage: int, checkpointing: bool) -> Way | None:
        """The largest micro-batch that fits and divides a rank's images; None if not even one image does."""
        sizes = [n for n in range(self.share, 0, -1) if self.share % n == 0 and self.enough(n)]
        return next((w for w in (self.way(stage, n, checkpointing) for n in sizes) if self.fits(w)), None)

    def limit(self, stage: int, checkpointing: bool) -> int:
        """Images of the largest micro-batch that memory allows, whatever divides; 0 if none."""
        recipe, config = self._at(stage, checkpointing)

        def enough(images: int) -> bool:
            held = memory(recipe, config, self.cluster.gpus, images, max(1, self.share // images))
            return held.peak <= self.usable

        low, high = 0, 1
        while enough(high) and high < MOST:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if enough(middle) else (low, middle)
        return low

    def choices(self) -> Iterator[Way]:
        """Ways that fit and keep what the user fixed."""
        given = self.recipe.train
        own = zero_stage(load_ds_config(self.recipe))
        for stage in [own] if "train.deepspeed" in self.fixed else self.stages():
            for checkpointing in (False, True):
                if "train.activation_checkpointing" in self.fixed and checkpointing != given.activation_checkpointing:
                    continue
                found = self._wanted(stage, checkpointing)
                if found is not None and self.fits(found):
                    yield found

    def best(self) -> Way | None:
        """The lowest stage that is within CLOSE of the fastest choice; without checkpointing where that is as fast.

        Stage 1 with bf16 adds up micro-batches in bf16: taken with accumulation only where nothing else fits, or the recipe
        names it.
        """
        choices = list(self.choices())
        own = zero_stage(load_ds_config(self.recipe))
        exact = [w for w in choices if w.stage in (0, 2, 3, own) or w.accumulation == 1 or not self._narrow()]
        among = exact or choices
        if not among:
            return None
        fastest = min(way.time.total for way in among)
        close = [way for way in among if way.time.total <= fastest * CLOSE]
        return min(close, key=lambda way: (way.stage, way.time.total))

    def stages(self) -> tuple[int, ...]:
        """Stages that the engine runs in the recipe's precision."""
        return STAGES if self.recipe.precision.compute == "fp32" else STAGES[1:]

    def _narrow(self) -> bool:
        return self.recipe.precision.compute == "bf16"

    def _wanted(self, stage: int, checkpointing: bool) -> Way | None:
        """The micro-batch that the user fixed, if it divides a rank's images; else the largest that fits."""
        given = self.recipe.train.micro_batch
        if "train.micro_batch" not in self.fixed or given is None:
            return self.largest(stage, checkpointing)
        micro = min(given, self.share)
        return self.way(stage, micro, checkpointing) if self.share % micro == 0 and self.enough(micro) else None

    def enough(self, micro_batch: int) -> bool:
        """Batch norm in the heads needs two images over all ranks."""
        try:
            check_batch_norm(self.recipe, micro_batch * self.cluster.gpus)
        except UserError:
            return False
        return True

    def _at(self, stage: int, checkpointing: bool) -> tuple[Recipe, dict[str, Any]]:
        recipe = with_checkpointing(self.recipe, checkpointing)
        if stage not in self._configs:
            own = load_ds_config(recipe)
            if zero_stage(own) != stage:
                shipped = recipe.train.model_copy(update={"deepspeed": f"zero{stage}", "deepspeed_override": {}})
                own = load_ds_config(recipe.model_copy(update={"train": shipped}))
            self._configs[stage] = own
        return recipe, self._configs[stage]


def check_batch(recipe: Recipe, gpus: int) -> None:
    """Refuse a number of GPUs that does not divide the global batch.

    Raises:
        UserError: names the nearest numbers of GPUs and global batches that would do.
    """
    batch = recipe.train.global_batch
    if batch % gpus == 0:
        return
    fewer = next(n for n in range(min(gpus, batch), 0, -1) if batch % n == 0)
    more = next((n for n in range(gpus + 1, batch + 1) if batch % n == 0), None)
    counts = f"{fewer} or {more} GPUs" if more is not None else f"at most {fewer} GPUs"
    found = (
        f"{gpus} GPUs are more than the images of a step"
        if gpus > batch
        else f"{batch} is not divisible by {gpus} GPUs"
    )
    nearest = max(1, round(batch / gpus)) * gpus
    raise UserError(
        f"train.global_batch {batch}: {found}; what fits: {counts}, or train.global_batch={nearest} (the learning rate follows it)"
    )
