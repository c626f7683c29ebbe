"""How samples are shared among processes; one process is the case of a share of everything."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor


def share(total: int, accelerator: Accelerator) -> list[int]:
    """The global sample indices of this process: every P-th, so each process has its part of every group."""
    return list(range(accelerator.process_index, total, accelerator.num_processes))


def gather_rows(local: Tensor, rows: list[int], total: int, accelerator: Accelerator) -> Tensor:
    """All processes' rows (n, …) in global order, (total, …); each row is added to zeros, hence exact."""
    out = torch.zeros((total, *local.shape[1:]), dtype=local.dtype, device=local.device)
    out[rows] = local
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(out)
    return out


def sum_gradients(parameters: list[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Adds the gradients of all processes; each holds the part of its own rows, already normalised globally."""
    if accelerator.num_processes == 1:
        return
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter).clone()


def slowest(seconds: float, accelerator: Accelerator) -> float:
    """The longest of all processes' times, so that all of them stop a run at the same epoch."""
    if accelerator.num_processes == 1:
        return seconds
    longest = torch.tensor(seconds, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
    return longest.item()
