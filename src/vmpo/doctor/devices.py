"""What there is to compute on."""

from __future__ import annotations

import os

import psutil
import torch

from vmpo.doctor.findings import Finding
from vmpo.training.memory import readable

BF16 = (8, 0)  # the compute capability from which GPUs have it


def devices() -> list[Finding]:
    """GPUs with their memory, and the CPU."""
    gpus = [_gpu(k) for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*(gpus or [_no_gpu()]), _cpu()]


def _gpu(index: int) -> Finding:
    here = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    bf16 = (here.major, here.minor) >= BF16
    text = f"{here.name}, {readable(total)}, {readable(free)} free, {'bf16' if bf16 else 'no bf16'}"
    remedy = () if bf16 else (f"GPU {index} has no bf16: model.weights=fp16, or fp32 with model.autocast=fp16",)
    return Finding(f"GPU {index}", "ok" if bf16 else "missing", text, remedy)


def _no_gpu() -> Finding:
    if torch.version.cuda or torch.version.hip:
        return Finding("GPU", "missing", "none that PyTorch can use", ("see whether nvidia-smi finds a GPU",))
    return Finding("GPU", "missing", "none: this build of PyTorch is for CPUs only")


def _cpu() -> Finding:
    memory, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    text = f"{cores or os.cpu_count()} cores, {torch.get_num_threads()} threads in use, "
    return Finding("CPU", "ok", f"{text}{readable(memory.total)}, {readable(memory.available)} free")
