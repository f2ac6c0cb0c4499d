"""Flow-matching training of the demo model's transformer, data-parallel over single-threaded processes.

One thread a process: two OpenMP threads that share cores with anything else wait for each other at
every operation, and lose more than half of the machine.
"""

import os
import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import HiDreamImageTransformer2DModel
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from scripts.demo_model.captions import caption_of
from scripts.demo_model.checkpoints import load_state, rate_factor, save_state
from scripts.demo_model.latents import PICTURE_SIZES, VAE_FACTOR, EncodedScenes, PictureSize, load_scenes
from scripts.demo_model.muon import Muon
from scripts.demo_model.text_encoders import TextEncoders
from scripts.demo_model.transformer import new_transformer, patchify, token_layout, training_forward

_MUON_RATE = 8e-3
_ADAM_RATE = 3e-3
_EMA_DECAY = 0.999
_BALANCE_WEIGHT = 0.01
_EMPTY_CAPTION_SHARE = 0.1
_UNIFORM_NOISE_SHARE = 0.15
_LOG_EVERY = 50
_SAVE_EVERY = 200


@dataclass(frozen=True)
class SizeTraining:
    """How one image size is trained: samples a step and process, and where its noise lies."""

    batch_size: int
    noise_logit: float


_SIZE_TRAINING = {
    "128x128": SizeTraining(16, 0.7),
    "256x256": SizeTraining(7, 1.0),
    "192x256": SizeTraining(8, 0.9),
    "256x192": SizeTraining(8, 0.9),
    "256x384": SizeTraining(4, 1.1),
    "384x256": SizeTraining(4, 1.1),
    "512x512": SizeTraining(2, 1.4),
}
# From a share of the training on: how often each size is trained.
_SHARES: tuple[tuple[float, dict[str, float]], ...] = (
    (0.0, {"128x128": 0.7, "256x256": 0.3}),
    (0.25, {"128x128": 0.25, "256x256": 0.65, "192x256": 0.03, "256x192": 0.03, "512x512": 0.04}),
    (
        0.55,
        {
            "128x128": 0.1,
            "256x256": 0.6,
            "192x256": 0.04,
            "256x192": 0.04,
            "256x384": 0.03,
            "384x256": 0.03,
            "512x512": 0.16,
        },
    ),
)


def _size_of_step(progress: float, rng: random.Random) -> PictureSize:
    shares = [shares for start, shares in _SHARES if progress >= start][-1]
    name = rng.choices(list(shares), list(shares.values()))[0]
    return next(size for size in PICTURE_SIZES if size.name == name)


def _is_muon_parameter(name: str, parameter: nn.Parameter) -> bool:
    is_in_block = "_blocks." in name or name.startswith("caption_projection")
    return is_in_block and parameter.ndim == 2 and "gate.weight" not in name


def _sample_sigmas(batch_size: int, noise_logit: float) -> Tensor:
    logits = torch.randn(batch_size) * 1.1 + noise_logit
    is_uniform = torch.rand(batch_size) < _UNIFORM_NOISE_SHARE
    return torch.where(is_uniform, torch.rand(batch_size), logits.sigmoid()).clamp(0.001, 0.9999)


def flow_loss(
    transformer: HiDreamImageTransformer2DModel,
    encoders: TextEncoders,
    scenes: EncodedScenes,
    size: PictureSize,
    num_text_tokens: int,
    rng: random.Random,
) -> tuple[Tensor, Tensor]:
    """The loss of one batch, and its part that is the flow's mean square error."""
    how = _SIZE_TRAINING[size.name]
    chosen = [rng.randrange(len(scenes.scenes)) for _ in range(how.batch_size)]
    captions = [
        "" if rng.random() < _EMPTY_CAPTION_SHARE else caption_of(scenes.scenes[index], rng)
        for index in chosen
    ]
    with torch.no_grad():
        embeddings = encoders(captions, num_text_tokens)
    data = patchify(scenes.latents[chosen].float())
    noise = torch.randn_like(data)
    sigmas = _sample_sigmas(len(data), how.noise_logit)
    noisy = torch.lerp(data, noise, sigmas[:, None, None])
    layout = token_layout(size.height // VAE_FACTOR, size.width // VAE_FACTOR, num_text_tokens)
    output, balance = training_forward(transformer, noisy, sigmas * 1000, embeddings, layout)
    square = (output - (data - noise)).square().mean()
    return square + _BALANCE_WEIGHT * balance, square.detach()


def _average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    norm = flat.norm()
    flat *= torch.clamp(1.0 / (norm + 1e-6), max=1.0)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _train_rank(
    rank: int, world_size: int, store: str, folder: Path, trained: TextEncoders, num_steps: int, seed: int
) -> None:
    torch.set_num_threads(1)
    # transformers' recording of hidden states does not survive pickling: make the encoders anew here.
    encoders = TextEncoders(trained.tokenizers).eval().requires_grad_(False)
    encoders.load_state_dict(trained.state_dict())
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.manual_seed(seed)
    transformer = new_transformer().train()
    named = list(transformer.named_parameters())
    averages = [parameter.detach().clone() for _, parameter in named]
    muon = Muon([parameter for name, parameter in named if _is_muon_parameter(name, parameter)], _MUON_RATE)
    others = [parameter for name, parameter in named if not _is_muon_parameter(name, parameter)]
    adam = torch.optim.AdamW(others, lr=_ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    step = 0
    state = load_state(folder / "transformer.pt")
    if state is not None:
        transformer.load_state_dict(state["model"])
        for average, (name, _) in zip(averages, named, strict=True):
            average.copy_(state["average"][name])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        step = state["step"]
    scenes: dict[str, EncodedScenes] = {}
    squares: dict[str, list[float]] = {}
    started = time.monotonic()
    while step < num_steps:
        progress = step / num_steps
        size = _size_of_step(progress, random.Random(f"{seed} size {step}"))
        if size.name not in scenes:
            scenes[size.name] = load_scenes(folder, size, seed)
        torch.manual_seed((seed * 1_000_003 + step) * world_size + rank)
        # Short texts are cheap; the pipeline's own length gets the last part of the training.
        num_text_tokens = 64 if progress > 0.8 or step % 10 == 0 else 32
        rng = random.Random(f"{seed} batch {step} {rank}")
        loss, square = flow_loss(transformer, encoders, scenes[size.name], size, num_text_tokens, rng)
        torch.autograd.backward(loss)
        _average_gradients(transformer.parameters())
        factor = rate_factor(progress, warm_up=0.02, decay_from=0.5, floor=0.01)
        for group in adam.param_groups:
            group["lr"] = _ADAM_RATE * factor
        muon.step(factor)
        adam.step()
        transformer.zero_grad()
        step += 1
        decay = min(_EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, [parameter.detach() for _, parameter in named], 1 - decay)
        squares.setdefault(size.name, []).append(float(square))
        if rank == 0 and step % _LOG_EVERY == 0:
            means = " ".join(f"{name} {sum(values) / len(values):.4f}" for name, values in squares.items())
            print(
                f"step {step} of {num_steps}, {(time.monotonic() - started) / _LOG_EVERY:.3f} s: {means}",
                flush=True,
            )
            squares, started = {}, time.monotonic()
        if rank == 0 and (step % _SAVE_EVERY == 0 or step == num_steps):
            save_state(
                folder / "transformer.pt",
                {
                    "model": transformer.state_dict(),
                    "average": {name: average for (name, _), average in zip(named, averages, strict=True)},
                    "muon": muon.state_dict(),
                    "adam": adam.state_dict(),
                    "step": step,
                },
            )
    dist.destroy_process_group()


def train_transformer(
    folder: Path, encoders: TextEncoders, num_steps: int, seed: int, num_processes: int = 2
) -> None:
    """Train on the scenes in `folder`, or go on where it has a state; the result stays there."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as meeting_place:
        store = str(Path(meeting_place) / "store")
        spawn(_train_rank, (num_processes, store, folder, encoders, num_steps, seed), nprocs=num_processes)


def averaged_transformer(folder: Path) -> HiDreamImageTransformer2DModel:
    """The transformer with the moving average of its weights, as far as it is trained."""
    state = load_state(folder / "transformer.pt")
    transformer = new_transformer()
    if state is not None:
        transformer.load_state_dict(state["average"])
    return transformer.eval().requires_grad_(False)
