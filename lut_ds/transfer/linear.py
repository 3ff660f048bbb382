"""MAE's linear probe: LARS over a frozen encoder and augmented images (He et al. 2022, appendix A.1, and its code)."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lut_ds.analysis.figures import write_aside
from lut_ds.data.loader import Batch, PretrainLoader
from lut_ds.data.progress import progress_bar
from lut_ds.data.sources import Source
from lut_ds.data.views import ViewSpec
from lut_ds.engine.schedules import lr_at, peak_lr
from lut_ds.engine.signals import StopRequest, listen
from lut_ds.errors import RunFault, UserError
from lut_ds.transfer.features import Compute, Features
from lut_ds.transfer.lars import LARS
from lut_ds.transfer.models import Pool, Pretrained
from lut_ds.transfer.probe_accuracy import accuracies, folded

VIEW = ViewSpec("random_resized_crop", scale=(0.08, 1.0))
BN_EPS = 1e-6
_LARGE = 1024  # ViT-L's width
_RANK_BATCH = 512  # images a rank and forward pass, as published: BatchNorm's statistics are over so many
_SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Protocol:
    """MAE's: batch 16384, lr blr * batch / 256 with 10 epochs of warm-up to a cosine; `epochs` None: as `published_epochs`."""

    epochs: int | None = None
    batch: int = 16384
    blr: float = 0.1
    warmup_epochs: float = 10.0
    weight_decay: float = 0.0
    seed: int = 0

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return peak_lr(self.blr, self.batch, "linear")


def published_epochs(width: int) -> int:
    """MAE's for an encoder of this width: 90, and 50 for ViT-L and ViT-H."""
    return 50 if width >= _LARGE else 90


def check_batch(batch: int, images: int, ranks: int) -> None:
    """UserError unless ranks can share a batch, and there are images for one."""
    if batch > images or batch % ranks:
        raise UserError(
            f"--batch: expected a multiple of {ranks} ranks and at most the {images} training images, found {batch}; "
            "choose another (the learning rate follows it)"
        )


class Head(nn.Module):
    """BatchNorm without affine, then a linear layer whose weight starts at N(0, 0.01) and bias at 0."""

    def __init__(self, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=BN_EPS)
        self.linear = nn.Linear(width, classes)
        nn.init.normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        return self.linear(self.norm(features))

    def folded(self) -> dict[str, Tensor]:
        """The head in eval mode as one linear layer (see `accuracy.folded`)."""
        mean, var = self.norm.running_mean, self.norm.running_var
        if mean is None or var is None:
            raise ValueError("BatchNorm without running statistics")
        tensors = (self.linear.weight.detach(), self.linear.bias.detach(), mean, (var + BN_EPS).sqrt())
        return folded(*(t.cpu() for t in tensors))


@dataclass
class Outcome:
    """How far a probe came: `step` of `steps`; `stopped_by` the signal that ended it early, None at the end."""

    head: Head
    history: list[dict[str, float]]
    step: int
    steps: int
    stopped_by: str | None


class LinearProbe:
    """Trains a head; saves it with its momentum beside the results, and takes it up again.

    Args:
        found: the encoder, frozen, in eval mode.
        train: labelled images.
        val: validation features of the same encoder, on which the head is measured after every epoch.
        folder: where `probe.safetensors` is kept; one for all ranks.

    Raises:
        UserError: batch sizes that do not divide, or a set smaller than one batch.
    """

    def __init__(
        self,
        found: Pretrained,
        pool: Pool,
        train: Source,
        val: Features,
        protocol: Protocol,
        folder: Path,
        compute: Compute,
    ) -> None:
        self.epochs = protocol.epochs or published_epochs(found.model.num_features)
        self._found, self._pool, self._train, self._val = found, pool, train, val
        self._protocol, self._compute = protocol, compute
        self._file = folder / "probe.safetensors"
        ranks = compute.ranks
        check_batch(protocol.batch, len(train), ranks.world_size)
        share = protocol.batch // ranks.world_size
        self._micro = max(m for m in range(1, min(_RANK_BATCH, share) + 1) if share % m == 0)
        self._model = found.model.to(ranks.device).eval().requires_grad_(False)
        self._head = Head(found.model.num_features, len(train.classes), protocol.seed).to(ranks.device)
        self._optimizer = LARS(self._head.parameters(), protocol.lr, protocol.weight_decay)
        self._identity = {
            "protocol": {**asdict(protocol), "epochs": self.epochs},
            "pool": pool,
            "weights": found.record["weights"],
            "image_size": found.image_size,
            "images": len(train),
            "classes": train.classes,
        }
        self._history: list[dict[str, float]] = []

    def run(self) -> Outcome:
        """Train to the end, or to a signal (SIGTERM, SIGINT, SIGUSR1, SIGUSR2), after which the same call continues."""
        protocol = self._protocol
        start = self._restore()
        with listen() as request, self._loader() as loader:
            per_epoch = loader.steps_per_epoch
            steps, step, saved = self.epochs * per_epoch, start, time.monotonic()
            batches = loader.batches(start, steps)
            stopped = None
            with progress_bar("linear probe", steps, start, unit="step") as bar:
                while step < steps and stopped is None:
                    lr = lr_at(step / per_epoch, protocol.lr, 0.0, protocol.warmup_epochs, self.epochs)
                    loss = self._step(batches, loader.accumulation, lr)
                    step += 1
                    bar.update(1)
                    if step % per_epoch == 0:
                        self._measure(step // per_epoch, loss, lr)
                        bar.set_postfix({k: f"{v:.4g}" for k, v in self._history[-1].items() if k in ("loss", "top1")})
                    stopped = self._stop(request)
                    if stopped or step == steps or time.monotonic() - saved > _SAVE_SECONDS:
                        self._save(step)
                        saved = time.monotonic()
            loader.close()
        return Outcome(self._head.eval(), self._history, step, steps, stopped)

    def _loader(self) -> PretrainLoader:
        ranks, protocol = self._compute.ranks, self._protocol
        return PretrainLoader(
            self._train,
            [VIEW],
            image_size=self._found.image_size,
            num_patches=1,
            seed=protocol.seed,
            global_batch=protocol.batch,
            micro_batch=self._micro,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
            threads=self._compute.threads,
        )

    def _step(self, batches: Iterator[Batch], accumulation: int, lr: float) -> float:
        """One update; the mean loss over the ranks."""
        self._head.train()
        self._optimizer.zero_grad()
        total = torch.zeros((), device=self._compute.ranks.device)
        for _ in range(accumulation):
            batch = next(batches)
            labels = torch.tensor([self._train.label(i) for i in batch.samples.tolist()])
            if total.device.type == "cuda":  # from pageable memory the copy would wait for all that is queued there
                labels = labels.pin_memory().to(total.device, non_blocking=True)
            with torch.no_grad(), self._compute.autocast():
                features = self._found.features(self._found.normalised(batch.views[0]), self._pool)
            loss = F.cross_entropy(self._head(features.float()), labels) / accumulation
            loss.backward()
            total += loss.detach()
        world = self._compute.ranks.world_size
        if world > 1:
            for tensor in (total, *(p.grad for p in self._head.parameters() if p.grad is not None)):
                dist.all_reduce(tensor)
                tensor /= world
        if not torch.isfinite(total):
            raise RunFault("probe: the loss is NaN or infinite; lower --blr")
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return float(total)

    @torch.no_grad()
    def _measure(self, epoch: int, loss: float, lr: float) -> None:
        """Accuracy with rank 0's running statistics, as the published code's DistributedDataParallel has."""
        self._share_statistics()
        logits = self._head.eval()(self._val.values.to(self._compute.ranks.device)).cpu()
        found = accuracies(logits, self._val.labels, self._train.classes)
        top5 = {} if found["top5"] is None else {"top5": found["top5"]}
        self._history.append({"epoch": epoch, "loss": loss, "lr": lr, "top1": found["top1"], **top5})

    def _share_statistics(self) -> None:
        if self._compute.ranks.world_size > 1:
            for buffer in self._head.buffers():
                dist.broadcast(buffer, src=0)

    def _stop(self, request: StopRequest) -> str | None:
        """The signal of any rank."""
        world = self._compute.ranks.world_size
        if world == 1:
            return request.signal_name
        names: list[str | None] = [None] * world
        dist.all_gather_object(names, request.signal_name)
        return next((name for name in names if name), None)

    def _save(self, step: int) -> None:
        self._share_statistics()
        if not self._compute.ranks.main:
            return
        momenta = {
            f"momentum.{n}": self._optimizer.state[p]["momentum_buffer"] for n, p in self._head.named_parameters()
        }
        tensors = {name: value.contiguous().cpu() for name, value in {**self._head.state_dict(), **momenta}.items()}
        state = {"identity": self._identity, "step": step, "history": self._history}
        write_aside(self._file, save(tensors, {"state": json.dumps(state)}))

    def _restore(self) -> int:
        """The step to go on from: 0 where nothing was saved."""
        if not self._file.is_file():
            return 0
        try:
            with safe_open(self._file, "pt", device=str(self._compute.ranks.device)) as file:
                state = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"probe: {self._file}: cannot be read: {error}; delete it to start anew") from error
        if state["identity"] != self._identity:
            changed = [key for key, value in self._identity.items() if state["identity"].get(key) != value]
            raise UserError(
                f"probe: {self._file}: saved by another probe ({', '.join(changed)} differ); name another folder with -o"
            )
        self._head.load_state_dict({n: t for n, t in tensors.items() if not n.startswith("momentum.")})
        for name, parameter in self._head.named_parameters():
            self._optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"]
        self._history = state["history"]
        return int(state["step"])


def evaluate_head(head: Head, val: Features, classes: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`top1`, `top5`, `per_class` of a head in eval mode, as one linear layer, which is returned too."""
    layer = head.folded()
    return accuracies(val.values @ layer["head.weight"].T + layer["head.bias"], val.labels, classes), layer
