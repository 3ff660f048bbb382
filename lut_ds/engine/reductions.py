"""ZeRO 1/2's gradients between backward pass and update: streams wait for each other, the host waits for nothing."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def keep_host_running(optimizer: Any) -> None:
    """Let the optimizer's stream wait for the exchange where DeepSpeed 0.19.8 has the host wait for the whole device.

    With `overlap_comm` the gradients are reduced on a stream of their own, and at the end of every backward pass DeepSpeed
    synchronises the device before it takes them up. What follows runs on the current stream, so that it is enough that this
    stream waits; buffers that are used again were written, and are read, in that same order. The exchange waits for the current
    stream as well: without contiguous gradients DeepSpeed relies on the same call for gradients that are still computed.

    Args:
        optimizer: DeepSpeed's ZeRO 1 or 2.
    """
    from deepspeed.accelerator import get_accelerator

    finish = optimizer.independent_gradient_partition_epilogue
    accelerator = get_accelerator()

    def wait_on_the_stream(device_index: int | None = None) -> None:
        current, exchange = accelerator.current_stream(), optimizer.reduction_stream
        exchange.wait_stream(current)
        current.wait_stream(exchange)

    def finish_without_waiting() -> None:
        before = accelerator.synchronize
        accelerator.synchronize = wait_on_the_stream
        try:
            finish()
        finally:
            accelerator.synchronize = before

    optimizer.independent_gradient_partition_epilogue = finish_without_waiting


def gradient_norm(optimizer: Any) -> Tensor:
    """L2 norm of the averaged gradients over all ranks, before clipping: float32, 0-dim; infinite where it is not finite.

    In place of DeepSpeed's, which takes an exchange for each parameter group and kernels for each parameter, and copies a
    constant to the device each time, for which the host waits.

    Args:
        optimizer: DeepSpeed's ZeRO 1 or 2, at the end of the last micro-batch's backward pass.
    """
    shard = [part for group in optimizer.averaged_gradients.values() for part in group]
    total = torch.stack(torch._foreach_norm(shard, 2, torch.float32)).square().sum()
    dist.all_reduce(total, group=optimizer.dp_process_group)
    norm = total.sqrt()
    return torch.where(norm.isfinite(), norm, torch.inf)
