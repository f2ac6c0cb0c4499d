"""Writes the demo model in the library's layout, and swaps it in whole."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    UniPCMultistepScheduler,
)

from scripts.demo_model.text_encoders import TextEncoders

# The scheduler of HiDream-I1-Full.
FLOW_SHIFT = 3.0
WEIGHT_DTYPE = torch.float16
DEFAULT_GENERATION = {"width": 256, "height": 256, "num_inference_steps": 24, "guidance_scale": 3.5}


def new_scheduler() -> UniPCMultistepScheduler:
    """HiDream-I1-Full's scheduler."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )


def write_checkpoint(
    folder: Path, text_encoders: TextEncoders, transformer: HiDreamImageTransformer2DModel, vae: AutoencoderKL
) -> int:
    """Write a checkpoint to `folder`, replacing one that is there; a reader never sees half of it.

    Returns:
        Its size in bytes.
    """
    tokenizers = text_encoders.tokenizers
    pipeline = HiDreamImagePipeline(
        scheduler=new_scheduler(),
        vae=vae,
        text_encoder=text_encoders.clip,
        tokenizer=tokenizers.clip,
        text_encoder_2=text_encoders.clip_2,
        tokenizer_2=tokenizers.clip_2,
        text_encoder_3=text_encoders.t5,
        tokenizer_3=tokenizers.t5,
        text_encoder_4=text_encoders.llama,
        tokenizer_4=tokenizers.llama,
        transformer=transformer,
    )
    pipeline.to(dtype=WEIGHT_DTYPE)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    for path in partial.rglob("*.safetensors"):
        path.chmod(0o644)
    generation = json.dumps(DEFAULT_GENERATION, indent=2) + "\n"
    (partial / "generation_config.json").write_text(generation)
    retired = folder.with_name(folder.name + ".retired")
    shutil.rmtree(retired, ignore_errors=True)
    if folder.exists():
        folder.rename(retired)
    partial.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
