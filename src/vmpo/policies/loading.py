"""From a model's name or folder to a policy."""

from __future__ import annotations

import importlib
import importlib.util
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

from vmpo.errors import UserError
from vmpo.features.weights import DTYPES as NETWORK_DTYPES
from vmpo.policies.attention import use_attention
from vmpo.policies.pipeline import Call, PipelinePolicy
from vmpo.policies.stable_diffusion import StableDiffusionPolicy
from vmpo.policies.stable_diffusion_3 import StableDiffusion3Policy
from vmpo.policies.stable_diffusion_xl import StableDiffusionXLPolicy

POLICIES: dict[str, type[PipelinePolicy]] = {
    policy.pipeline_class.__name__: policy
    for policy in (StableDiffusionPolicy, StableDiffusionXLPolicy, StableDiffusion3Policy)
}
EMBEDDED = ("glyphs", "glyphs-ddim")
DTYPES = {**NETWORK_DTYPES, "none": None}


@dataclass(frozen=True)
class Loading:
    """Which weights are loaded, and how they are kept.

    Attributes:
        weights: "fp32", "bf16" or "fp16" of the frozen networks.
        vae_weights: of the autoencoder; None: as `weights`.
        variant, revision: of the files on the hub.
        t5: whether Stable Diffusion 3 gets its third text encoder.
        quantise: "none", or "int8" or "nf4" for the frozen denoiser and T5.
        checkpointing: activations are computed again in the backward pass instead of kept.
        attention: "auto", or one of PyTorch's kernels.
        vae_slicing: pictures are decoded one by one.
    """

    weights: str = "fp32"
    vae_weights: str | None = None
    variant: str | None = None
    revision: str | None = None
    t5: bool = True
    quantise: str = "none"
    checkpointing: bool = False
    attention: str = "auto"
    vae_slicing: bool = False


def model_folder(path: str) -> str:
    """The folder of an embedded model, or the path itself."""
    return str(resources.files("vmpo").joinpath(f"assets/{path}")) if path in EMBEDDED else path


def load_policy(
    path: str,
    call: Call,
    loading: Loading | None = None,
    device: torch.device | str = "cpu",
) -> PipelinePolicy:
    """Loads a pipeline, frozen and in evaluation mode, as a policy.

    Raises:
        UserError: if the weights are not there, a package is missing, or no policy is written for the pipeline.
    """
    folder, loading = model_folder(path), loading or Loading()
    policy_class = policy_class_of(path, loading.revision)
    pipe = _load_pipeline(path, folder, policy_class, loading)
    pipe.set_progress_bar_config(disable=True)
    _place(pipe, policy_class, call, loading, torch.device(device))
    return as_policy(pipe, call, loading)


def as_policy(pipe: DiffusionPipeline, call: Call, loading: Loading) -> PipelinePolicy:
    """A pipeline as a policy: frozen, in evaluation mode, with the savings of memory that are asked for."""
    policy_class = POLICIES[type(pipe).__name__]
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    if loading.checkpointing:
        getattr(pipe, policy_class.denoiser_name).enable_gradient_checkpointing()
    if loading.vae_slicing:
        pipe.vae.enable_slicing()
    use_attention(loading.attention)
    return policy_class(pipe, call)


def policy_class_of(path: str, revision: str | None = None) -> type[PipelinePolicy]:
    """The policy written for a pipeline.

    Raises:
        UserError: if there is none, with the file to write.
    """
    name = pipeline_class(model_folder(path), revision)
    if name not in POLICIES:
        raise UserError(
            f"model '{path}' is a {name}, which vmpo does not know; it knows {', '.join(POLICIES)}. "
            f"To add it, write src/vmpo/policies/<model>.py as docs/extending.md shows"
        )
    return POLICIES[name]


def pipeline_class(folder: str, revision: str | None = None) -> str:
    """The class named in `model_index.json` of a folder or hub repository.

    Raises:
        UserError: if it cannot be found, with the way to get the weights.
    """
    try:
        index = DiffusionPipeline.load_config(folder, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no diffusers model at '{folder}': it is neither a folder with a model_index.json nor a hub model that "
            f"can be reached; 'hf download {folder} --local-dir DIR' fetches one, then pass model.path=DIR"
        ) from error
    return str(index["_class_name"])


def _load_pipeline(path: str, folder: str, policy_class: type[PipelinePolicy], loading: Loading) -> DiffusionPipeline:
    left_out = _left_out(folder, policy_class, loading)
    options: dict[str, Any] = {"dtype": DTYPES[loading.weights], **dict.fromkeys(left_out)}
    for name in ("variant", "revision"):
        if (value := getattr(loading, name)) is not None:
            options[name] = value
    if loading.quantise != "none":
        options["quantization_config"] = quantisation(policy_class, loading)
    try:
        pipe = policy_class.pipeline_class.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"model '{path}' could not be loaded: {str(error).splitlines()[0]}") from error
    pipe.vae.to(vae_dtype(pipe, loading))
    return pipe


def vae_dtype(pipe: DiffusionPipeline, loading: Loading) -> torch.dtype | None:
    """The precision of the autoencoder: as asked for, unless its activations overflow half precision."""
    dtype = DTYPES[loading.vae_weights or loading.weights]
    upcast = POLICIES[type(pipe).__name__].upcasts_vae and pipe.vae.config.force_upcast
    return torch.float32 if upcast and dtype is torch.float16 else dtype


def _left_out(folder: str, policy_class: type[PipelinePolicy], loading: Loading) -> list[str]:
    # components that vmpo never calls, or that a model was saved without: from_pretrained would insist on them
    index_file = Path(folder) / "model_index.json"
    index: dict[str, Any] = json.loads(index_file.read_text()) if index_file.is_file() else {}
    absent = [k for k, v in index.items() if isinstance(v, list) and v[0] is None]
    t5 = ("text_encoder_3", "tokenizer_3") if "text_encoder_3" in policy_class.encoder_names else ()
    without = [name for name in t5 if not loading.t5 or (index and name not in index)]
    return list(dict.fromkeys([*policy_class.unused_components, *absent, *without]))


def quantisation(policy_class: type[PipelinePolicy], loading: Loading) -> PipelineQuantizationConfig:
    """The frozen denoiser, and T5 where it is loaded, in fewer bits; the adapter beside them is not.

    int8 is torchao's, each weight row with its own scale; nf4 is bitsandbytes' (Dettmers et al. 2023, arXiv
    2305.14314) and needs a GPU.

    Raises:
        UserError: if the package is not installed.
    """
    package = {"int8": "torchao", "nf4": "bitsandbytes"}[loading.quantise]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"model.quantise={loading.quantise} needs the package {package}: pip install {package}")
    t5 = ["text_encoder_3"] if "text_encoder_3" in policy_class.encoder_names and loading.t5 else []
    names = [policy_class.denoiser_name, *t5]
    libraries = [transformers if name in t5 else diffusers for name in names]
    if loading.quantise == "int8":
        kind = importlib.import_module("torchao.quantization").Int8WeightOnlyConfig(version=2)
        return PipelineQuantizationConfig(
            quant_mapping={n: lib.TorchAoConfig(kind) for n, lib in zip(names, libraries, strict=True)}
        )
    options = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": DTYPES[loading.weights],
    }
    return PipelineQuantizationConfig(
        quant_mapping={n: lib.BitsAndBytesConfig(**options) for n, lib in zip(names, libraries, strict=True)}
    )


def _place(
    pipe: DiffusionPipeline, policy_class: type[PipelinePolicy], call: Call, loading: Loading, device: torch.device
) -> None:
    encoders = policy_class.encoder_names
    stays = encoders if call.offload_encoders else ()
    quantised = (policy_class.denoiser_name, "text_encoder_3") if loading.quantise != "none" else ()
    for name, component in pipe.components.items():
        # quantised weights were put where they belong by the loader
        if isinstance(component, torch.nn.Module) and name not in stays and name not in quantised:
            component.to(device)
