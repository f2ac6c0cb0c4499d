"""Checkpoints for tests: a tiny random HiDream-I1 in real diffusers format, and variants of one.

Building takes a second or two; every component is of its real class.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH = 32
LLAMA_LAYERS_READ = (0, 2)  # of three: the middle one is computed and never read
MAX_TOKENS_OF_T5 = 64

SCHEDULERS = {
    "full": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "dev": lambda: FlowMatchLCMScheduler(shift=6.0),
    "fast": lambda: FlowMatchLCMScheduler(shift=3.0),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "euler_dynamic": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
}


def write_tiny_checkpoint(folder: Path, llama_folder: Path | None = None) -> Path:
    """Write a tiny random checkpoint, of the Full variant.

    Args:
        folder: of the checkpoint; made.
        llama_folder: where Llama goes; into the checkpoint where None.

    Returns:
        `folder`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama_tokenizer = _llama_tokenizer()
        llama = _llama(llama_tokenizer)
        clip_tokenizer = _clip_tokenizer()
        pipeline = HiDreamImagePipeline(
            scheduler=SCHEDULERS["full"](),
            vae=_vae(),
            text_encoder=_clip(clip_tokenizer, projection_dim=16),
            tokenizer=clip_tokenizer,
            text_encoder_2=_clip(clip_tokenizer, projection_dim=24),
            tokenizer_2=clip_tokenizer,
            text_encoder_3=_t5(),
            tokenizer_3=_t5_tokenizer(),
            text_encoder_4=llama if llama_folder is None else None,
            tokenizer_4=llama_tokenizer if llama_folder is None else None,
            transformer=_transformer(),
        )
    pipeline.save_pretrained(folder)
    if llama_folder is not None:
        llama.save_pretrained(llama_folder)
        llama_tokenizer.save_pretrained(llama_folder)
    # Published checkpoints hold CLIP's tokenizers as vocab.json and merges.txt; here the first does.
    clip = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(clip["vocab"]))
    merges = ["#version: 0.2", *(" ".join(merge) for merge in clip["merges"])]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(merges) + "\n")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    return folder


def write_variant(source: Path, folder: Path, scheduler: str) -> Path:
    """Write a checkpoint with the weights of another one (linked) and another scheduler.

    Args:
        source: the other checkpoint.
        folder: of the new one; made.
        scheduler: a key of `SCHEDULERS`.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True)
    for part in source.iterdir():
        if part.name not in {"scheduler", "model_index.json", "generation_config.json"}:
            (folder / part.name).symlink_to(part.resolve())
    new_scheduler = SCHEDULERS[scheduler]()
    new_scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((source / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(new_scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    own_defaults = source / "generation_config.json"
    if own_defaults.exists():
        # Steps and guidance are the variant's.
        defaults = json.loads(own_defaults.read_text())
        size = {name: defaults[name] for name in ("width", "height")}
        (folder / "generation_config.json").write_text(json.dumps(size))
    return folder


def write_unlimited_t5(source: Path, folder: Path) -> Path:
    """Write a checkpoint whose T5 takes prompts of any length, all else of another one (linked).

    Args:
        source: the other checkpoint.
        folder: of the new one; made.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True)
    for part in source.iterdir():
        if part.name != "tokenizer_3":
            (folder / part.name).symlink_to(part.resolve())
    shutil.copytree(source / "tokenizer_3", folder / "tokenizer_3")
    settings = folder / "tokenizer_3" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 512}))
    return folder


def write_reshaped(source: Path, folder: Path, **transformer: object) -> Path:
    """Write a checkpoint with another transformer, the other components of another one (linked).

    Its weights are large, so that every part of the transformer has a say in the picture.

    Args:
        source: the other checkpoint.
        folder: of the new one; made.
        transformer: what differs from the tiny checkpoint's configuration.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True)
    for part in source.iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part.resolve())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = _transformer(**transformer)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.5)
        model.save_pretrained(folder / "transformer")
    return folder


def write_promised(source: Path, folder: Path, **transformer: object) -> Path:
    """Write a checkpoint whose transformer is as large as its headers say, and takes no room on the disk.

    Args:
        source: a checkpoint, whose other components are linked.
        folder: of the new one; made.
        transformer: what differs from the tiny checkpoint's configuration.

    Returns:
        `folder`.
    """
    (folder / "transformer").mkdir(parents=True)
    for part in source.iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part.resolve())
    with torch.device("meta"):
        model = _transformer(**transformer)
    model.save_config(folder / "transformer")
    header: dict[str, object] = {}
    end = 0
    for name, parameter in model.state_dict().items():
        start, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with (folder / "transformer" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        # The rest of the file is a hole.
        file.truncate(8 + len(encoded) + end)
    return folder


def write_spoilt(
    source: Path, folder: Path, spoil: Mapping[str, Callable[[dict[str, Tensor]], None]]
) -> Path:
    """Write a checkpoint with altered weights, everything else of another one (linked).

    Args:
        source: the other checkpoint, whose components are one file each.
        folder: of the new one; made.
        spoil: by component, what is done to its weights, by their names.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True)
    for part in source.iterdir():
        if part.name not in spoil:
            (folder / part.name).symlink_to(part.resolve())
    for component, spoil_weights in spoil.items():
        shutil.copytree(source / component, folder / component)
        (path,) = (folder / component).glob("*.safetensors")
        weights = load_file(path)
        spoil_weights(weights)
        save_file(weights, path, metadata={"format": "pt"})
    return folder


def _transformer(**changes: object) -> HiDreamImageTransformer2DModel:
    config: dict[str, object] = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_channels": [WIDTH, WIDTH],
        "text_emb_dim": 40,
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "axes_dims_rope": (2, 2, 4),
        "max_resolution": (16, 16),
        "llama_layers": list(LLAMA_LAYERS_READ),
    }
    return HiDreamImageTransformer2DModel(**(config | changes))


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def _clip(tokenizer: CLIPTokenizer, projection_dim: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            projection_dim=projection_dim,
            num_hidden_layers=1,
            num_attention_heads=4,
            # Of the released checkpoints the shorter CLIP has as many.
            max_position_embeddings=218,
            initializer_factor=3.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_t5_tokenizer()),
            d_model=WIDTH,
            d_kv=8,
            d_ff=WIDTH,
            num_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def _llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=max(LLAMA_LAYERS_READ) + 1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _clip_tokenizer() -> CLIPTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("b", "l"), ("bl", "u"), ("blu", "e</w>")]
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges)  # type: ignore[arg-type]


def _t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), ("▁red", -3.0), ("▁blue", -3.0)]
    pieces += [(chr(code), -5.0) for code in range(33, 127)] + [("红", -5.0), ("圆", -5.0)]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in (1, 0)]
    return T5Tokenizer(vocab=pieces, extra_ids=2, model_max_length=MAX_TOKENS_OF_T5)


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d"), ("b", "l"), ("bl", "u"), ("blu", "e")]
    pieces = [*alphabet, *("".join(merge) for merge in merges), begin, end]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    tokenizer.add_special_tokens([begin, end])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, pieces.index(begin))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)
