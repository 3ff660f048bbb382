"""What each process of the synchronised batch norm test does; few imports, because both processes start afresh."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from lut_ds.method.heads import HeadBatchNorm, make_head

WORLD = 2


def views_for(rank: int) -> list[Tensor]:
    """Two views of a rank's batch; ranks differ in mean and scale, so that local statistics are visibly wrong."""
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randn(3, 8, generator=generator) * (1 + rank) + 2 * rank + view for view in range(2)]


def head_of_all() -> nn.Sequential:
    """The head that every process starts from."""
    torch.manual_seed(7)
    head = make_head(3, 8, 10, "bn", "gelu")
    for parameter in head.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return head


def backward(head: nn.Module, views: list[Tensor]) -> dict[str, list[Tensor]]:
    """Outputs of both views, one after the other, gradients of a loss summed over rows, and the buffers."""
    inputs = [view.clone().requires_grad_() for view in views]
    outputs = [head(view) for view in inputs]
    sum((output * output.cos()).sum() for output in outputs).backward()
    return {
        "outputs": [output.detach() for output in outputs],
        "inputs": [view.grad for view in inputs],
        "weights": [parameter.grad for parameter in head.parameters()],
        "buffers": [buffer.clone() for buffer in head.buffers()],
    }


def synchronised_rank(rank: int, folder: str) -> None:
    """One process: its part of the batch through the head with shared statistics; results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD)
    head = head_of_all()
    for layer in head.modules():
        if isinstance(layer, HeadBatchNorm):
            layer.all_reduce_sum, layer.world_size = all_reduce, WORLD
    torch.save(backward(head, views_for(rank)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
