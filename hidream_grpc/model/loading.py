"""Loads parts of a checkpoint from its folder onto a device, as classes of the libraries that own them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, SchedulerMixin
from torch import nn

from hidream_grpc.devices.device import Device
from hidream_grpc.devices.faults import is_device_fault
from hidream_grpc.errors import HiDreamError, ModelNotFoundError
from hidream_grpc.logs import NOT_ON_TERMINAL
from hidream_grpc.model.checkpoint.weights.files import Library, read_tensors
from hidream_grpc.model.denoising.schedulers import SCHEDULER_CLASSES
from hidream_grpc.model.quantization import QuantizedLinear
from hidream_grpc.model.weight_format import WeightFormat, is_quantized_tensor
from hidream_grpc.model.weights import load_share

logger = logging.getLogger(__name__)

_MAX_SUMMARY_LETTERS = 1000
"""Limit for the text of an error: a library may list every tensor that is missing."""

_FLOATING_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of weights that an encoder can be mapped in, by their names in safetensors."""

_Module = TypeVar("_Module", bound=nn.Module)
_Tokenizer = TypeVar("_Tokenizer", bound=transformers.PreTrainedTokenizerBase)


def quieten_libraries() -> None:
    """Keep the libraries' advice and progress bars off the terminal; their errors stay."""
    for library_logging in (diffusers.utils.logging, transformers.utils.logging):
        library_logging.set_verbosity_error()
        library_logging.disable_progress_bar()


@contextmanager
def loading(folder: Path, flag: str, device: Device) -> Iterator[None]:
    """Attribute an error inside the block to a part of the checkpoint, unless it is one of the device.

    Args:
        folder: folder of the part.
        flag: flag that named the checkpoint.
        device: device of this rank.

    Raises:
        ModelNotFoundError: the part cannot be loaded; its traceback is logged, not shown.
        Exception: the error of the device, as its runtime raised it.
    """
    try:
        yield
    except HiDreamError:
        raise
    except Exception as error:
        if is_device_fault(error, device):
            raise
        logger.exception("cannot load %s", folder, extra=NOT_ON_TERMINAL)
        raise ModelNotFoundError(flag, folder, f"cannot be loaded: {summary_of(error)}") from None


def summary_of(error: Exception) -> str:
    """Kind and text of an error in one line."""
    text = " ".join(str(error).split())
    if len(text) > _MAX_SUMMARY_LETTERS:
        text = f"{text[:_MAX_SUMMARY_LETTERS]}…"
    return f"{type(error).__name__}: {text}"


def load_module(
    module_class: type[_Module],
    folder: Path,
    device: Device,
    weights: WeightFormat = WeightFormat.BFLOAT16,
) -> _Module:
    """Load one text encoder for inference, from local files alone.

    Args:
        module_class: class of transformers.
        folder: folder of the component, with config.json and weights in safetensors.
        device: device of the module, which also decides its dtype.
        weights: how to hold the matrices to which formats apply.
    """
    # Every model of the library has this method, but no common type declares it.
    from_pretrained: Any = module_class.from_pretrained  # type: ignore[attr-defined]
    # In the dtype of its files a module is a mapping of them, of which a quantized one is made bit by bit.
    dtype = _stored_dtype(folder, device.dtype) if weights.is_quantized else device.dtype
    module: _Module = from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    if weights.is_quantized:
        _quantize_layers(module, weights, device)
    module = module.to(device.torch_device).eval()
    if device.torch_device.type == "cpu":
        _own_memory(module)
    return module


def _stored_dtype(folder: Path, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of a text encoder's files; another one where they have several, or none that torch has."""
    dtypes = {tensor.dtype for tensor in read_tensors(folder, Library.TRANSFORMERS).values()}
    return _FLOATING_DTYPES.get(dtypes.pop(), otherwise) if len(dtypes) == 1 else otherwise


def _quantize_layers(module: nn.Module, weights: WeightFormat, device: Device) -> None:
    """Move a module's parameters to a device one after another, those of its layers quantized."""
    paths = [
        path
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear) and is_quantized_tensor(f"{path}.weight")
    ]
    for path in paths:
        owner_path, _, name = path.rpartition(".")
        owner = module.get_submodule(owner_path)
        setattr(owner, name, QuantizedLinear(getattr(owner, name), weights, device))
    others = [part for part in module.modules() if not isinstance(part, QuantizedLinear)]
    for parameter in (parameter for part in others for parameter in part.parameters(recurse=False)):
        parameter.data = parameter.data.to(device.torch_device, device.dtype)


def _own_memory(module: nn.Module) -> None:
    """Copy the weights, which may be a mapping of their file and would change when it does."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


def load_vae(folder: Path, device: Device) -> AutoencoderKL:
    """Load the autoencoder for inference, from the same files and as strictly as the transformer."""
    with torch.device("meta"):
        vae: AutoencoderKL = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    load_share(vae, folder, device)
    return vae.eval()


def load_tokenizer(tokenizer_class: type[_Tokenizer], folder: Path) -> _Tokenizer:
    """Load one tokenizer from local files alone."""
    from_pretrained: Any = tokenizer_class.from_pretrained
    tokenizer: _Tokenizer = from_pretrained(folder, local_files_only=True)
    return tokenizer


def load_scheduler(folder: Path) -> SchedulerMixin:
    """Load the scheduler that its own configuration names."""
    class_name = SCHEDULER_CLASSES["UniPCMultistepScheduler"].load_config(folder)["_class_name"]
    return SCHEDULER_CLASSES[class_name].from_pretrained(folder, local_files_only=True)
