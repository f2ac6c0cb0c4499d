"""The demo model's four text encoders, and their training on captions alone.

Linear heads must read the whole scene (background; shape, colour, position and size of each object)
from CLIP's projections and from every token of T5 and Llama. Afterwards the transformer finds the
scene laid out linearly in its conditioning, and the encoders stay as they are.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
)

from scripts.demo_model.captions import COLOURS, POSITIONS, SHAPES, SIZES, Scene, caption_of, sample_scene
from scripts.demo_model.checkpoints import load_state, rate_factor, save_state
from scripts.demo_model.prompt_tokenizers import CLIP_MAX_TOKENS, MAX_TOKENS, PromptTokenizers

POOLED_DIM = 128
CAPTION_DIM = 64
LLAMA_LAYERS = 3
_CLIP_DIM = 48
_OBJECT_SLOTS = 2
# One class more than there are words says that the slot is empty.
_OBJECT_CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(POSITIONS) + 1, len(SIZES) + 1)
_CLASSES = (len(COLOURS), *(_OBJECT_CLASSES * _OBJECT_SLOTS))


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the transformer gets of B prompts, T tokens each.

    t5: (B, T, 64); llama: (3, B, T, 64), one slice per decoder layer; pooled: (B, 128).
    """

    t5: Tensor
    llama: Tensor
    pooled: Tensor


class TextEncoders(nn.Module):
    """The pipeline's four text encoders."""

    def __init__(self, tokenizers: PromptTokenizers) -> None:
        super().__init__()
        self.tokenizers = tokenizers
        self.clip = _new_clip(tokenizers, hidden_dim=_CLIP_DIM, projection_dim=_CLIP_DIM)
        self.clip_2 = _new_clip(tokenizers, hidden_dim=64, projection_dim=POOLED_DIM - _CLIP_DIM)
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizers.t5),
                d_model=CAPTION_DIM,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
        llama = tokenizers.llama
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(llama),
                hidden_size=CAPTION_DIM,
                intermediate_size=160,
                num_hidden_layers=LLAMA_LAYERS,
                num_attention_heads=8,
                num_key_value_heads=4,
                head_dim=8,
                max_position_embeddings=512,
                initializer_range=0.1,
                tie_word_embeddings=True,
                bos_token_id=llama.bos_token_id,
                eos_token_id=llama.eos_token_id,
                pad_token_id=llama.eos_token_id,
            )
        )

    def forward(self, prompts: list[str], num_tokens: int = MAX_TOKENS) -> PromptEmbeddings:
        """Encode prompts as the library's pipeline does, T5 and Llama padded to `num_tokens`."""
        pooled = []
        for encoder, tokenizer in ((self.clip, self.tokenizers.clip), (self.clip_2, self.tokenizers.clip_2)):
            # Causal, so the shorter padding gives what the pipeline's 128 tokens give.
            tokens = tokenizer(
                prompts, padding="longest", max_length=CLIP_MAX_TOKENS, truncation=True, return_tensors="pt"
            )
            pooled.append(encoder(tokens.input_ids)[0])
        padding = {
            "padding": "max_length",
            "max_length": num_tokens,
            "truncation": True,
            "return_tensors": "pt",
        }
        tokens = self.tokenizers.t5(prompts, **padding)
        t5 = self.t5(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        tokens = self.tokenizers.llama(prompts, **padding)
        layers = self.llama.model(
            tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        return PromptEmbeddings(t5=t5, llama=torch.stack(layers[1:]), pooled=torch.cat(pooled, dim=-1))

    def each(self) -> Iterator[tuple[str, nn.Module]]:
        """Pairs of a checkpoint folder's name and its encoder."""
        yield "text_encoder", self.clip
        yield "text_encoder_2", self.clip_2
        yield "text_encoder_3", self.t5
        yield "text_encoder_4", self.llama


def _new_clip(
    tokenizers: PromptTokenizers, hidden_dim: int, projection_dim: int
) -> CLIPTextModelWithProjection:
    tokenizer = tokenizers.clip
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_dim,
            intermediate_size=2 * hidden_dim,
            projection_dim=projection_dim,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_MAX_TOKENS,
            initializer_factor=3.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def _labels(scenes: list[Scene]) -> Tensor:
    """(B, 9) class indices: background, then shape, colour, position, size of each slot."""
    colours = list(COLOURS)
    rows = []
    for scene in scenes:
        row = [colours.index(scene.background)]
        for slot in range(_OBJECT_SLOTS):
            if slot < len(scene.objects):
                item = scene.objects[slot]
                row += [SHAPES.index(item.shape), colours.index(item.colour)]
                row += [POSITIONS.index(item.position), SIZES.index(item.size)]
            else:
                row += [classes - 1 for classes in _OBJECT_CLASSES]
        rows.append(row)
    return torch.tensor(rows)


def _read_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over all attributes, and the share of scenes read without any mistake.

    Args:
        logits: (B, sum of classes) or (B, T, sum of classes).
        labels: (B, attributes).
    """
    if logits.ndim == 2:
        logits = logits[:, None]
    losses = []
    right = torch.ones(logits.shape[:2], dtype=torch.bool)
    for index, part in enumerate(logits.split(_CLASSES, dim=-1)):
        wanted = labels[:, index, None].expand(part.shape[:2])
        losses.append(functional.cross_entropy(part.flatten(0, 1), wanted.flatten()))
        right &= part.argmax(-1) == wanted
    return torch.stack(losses).mean(), right.float().mean()


def train_text_encoders(
    folder: Path, tokenizers: PromptTokenizers, num_steps: int, seed: int, batch_size: int = 128
) -> TextEncoders:
    """Train the encoders, or go on where `folder` has a state; returns them frozen, in evaluation mode."""
    torch.manual_seed(seed)
    encoders = TextEncoders(tokenizers)
    widths = {
        "clip": _CLIP_DIM,
        "clip_2": POOLED_DIM - _CLIP_DIM,
        "t5": CAPTION_DIM,
        "llama": CAPTION_DIM,
        "llama_middle": CAPTION_DIM,
    }
    heads = nn.ModuleDict({name: nn.Linear(width, sum(_CLASSES)) for name, width in widths.items()})
    model = nn.ModuleDict({"encoders": encoders, "heads": heads})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    state = load_state(folder / "text_encoders.pt")
    step = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    while step < num_steps:
        rng = random.Random(f"{seed} text {step}")
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate_factor(step / num_steps)
        scenes = [sample_scene(rng, single_share=0.6) for _ in range(batch_size)]
        embeddings = encoders(
            [caption_of(scene, rng) for scene in scenes], rng.choice((24, 32, 32, 32, 48, 64))
        )
        labels = _labels(scenes)
        # Llama is causal: only from the end of the prompt on can a token know all of it.
        readings = {
            "clip": embeddings.pooled[:, :_CLIP_DIM],
            "clip_2": embeddings.pooled[:, _CLIP_DIM:],
            "t5": embeddings.t5,
            "llama": embeddings.llama[-1][:, -4:],
            "llama_middle": embeddings.llama[-2][:, -4:],
        }
        results = {name: _read_loss(heads[name](reading), labels) for name, reading in readings.items()}
        spread = (embeddings.pooled.std(0) - 1).square().mean() + embeddings.pooled.mean(0).square().mean()
        loss = torch.stack([loss for loss, _ in results.values()]).sum() + 0.01 * spread
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            read = " ".join(f"{name} {float(right):.2f}" for name, (_, right) in results.items())
            print(f"text step {step} loss {float(loss.detach()):.3f} scenes read: {read}", flush=True)
            save_state(
                folder / "text_encoders.pt",
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
            )
    return encoders.eval().requires_grad_(False)
