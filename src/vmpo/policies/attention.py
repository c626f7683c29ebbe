"""Which of PyTorch's attention kernels the networks may use."""

from __future__ import annotations

import torch

KERNELS = ("flash", "efficient", "cudnn", "math")


def use_attention(name: str) -> None:
    """Leaves only one kernel of `scaled_dot_product_attention` on, or all for "auto", for the whole process.

    The UNets and transformers of Stable Diffusion call this function directly, so the choice is PyTorch's and not a
    processor of diffusers. Where the chosen kernel cannot take a call, PyTorch says so and stops.
    """
    backends = torch.backends.cuda
    switches = {
        "flash": backends.enable_flash_sdp,
        "efficient": backends.enable_mem_efficient_sdp,
        "cudnn": backends.enable_cudnn_sdp,
        "math": backends.enable_math_sdp,
    }
    for kernel, switch in switches.items():
        switch(name in ("auto", kernel))
