"""Judges a checkpoint on captions that it has not seen, drawn by the library's own pipeline.

Run from the repository's root: `python -m scripts.demo_model.evaluate [--size 512]`. Prints percentages
and, last, one JSON line.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import HiDreamImagePipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from scripts.demo_model.captions import Scene, caption_of, sample_scene
from scripts.demo_model.judge import Judgement, judge

_REPOSITORY = Path(__file__).resolve().parents[2]
_CHECKPOINT = _REPOSITORY / "hidream_grpc" / "demo_checkpoint"
_SHEET_PROMPTS = (
    "a red circle on a blue background",
    "a green square on a white background",
    "a yellow star in the top left on a black background",
    "红色圆形在蓝色背景上",
    "黑色背景上有一个黄色的五角星",
    "a big purple ring on a yellow background",
    "an orange triangle at the bottom right on a green background",
    "右上角有绿色三角形，白色背景",
    "a small white cross in the centre on a red background",
    "a blue square on the left and a red circle on the right on a white background",
    "a yellow ring above a purple square on a black background",
    "左边是红色方块，右边是蓝色圆环，黄色背景",
)


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: side in pixels, steps, guidance, pictures a batch."""

    size: int
    num_inference_steps: int
    guidance_scale: float
    batch_size: int


def load_pipeline(checkpoint: Path) -> HiDreamImagePipeline:
    """The checkpoint in the library's pipeline, float32, silent."""
    diffusers_logging.set_verbosity_error()
    pipeline = HiDreamImagePipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: HiDreamImagePipeline, prompts: list[str], sampling: Sampling, seed: int
) -> list[Image.Image]:
    """One picture for each prompt; picture i has the generator seeded with seed + i."""
    # The pipeline rescales what it is asked for to its own area.
    pipeline.default_sample_size = sampling.size // pipeline.vae_scale_factor
    images: list[Image.Image] = []
    for start in range(0, len(prompts), sampling.batch_size):
        batch = prompts[start : start + sampling.batch_size]
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))]
        images += pipeline(
            prompt=batch,
            height=sampling.size,
            width=sampling.size,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            generator=generators,
        ).images
    return images


def unseen_captions(count: int, seed: int) -> list[tuple[Scene, str]]:
    """Scenes and captions of a seed that training does not use."""
    rng = random.Random(f"{seed} evaluation")
    return [(scene, caption_of(scene, rng)) for scene in (sample_scene(rng) for _ in range(count))]


def summary(judgements: list[Judgement]) -> dict[str, float]:
    """Percentages of right pictures, by what is judged."""
    fields = ("background", "colour", "position", "shape", "colour_and_position", "everything")
    return {
        field: round(100 * sum(getattr(judgement, field) for judgement in judgements) / len(judgements), 1)
        for field in fields
    }


def contact_sheet(images: list[Image.Image], columns: int = 4) -> Image.Image:
    """All pictures in one, row by row."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=_CHECKPOINT)
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, help="default: the checkpoint's own")
    parser.add_argument("--guidance", type=float, help="default: the checkpoint's own")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sheet", type=Path, help="also draw a dozen fixed prompts into this PNG")
    parser.add_argument(
        "--failures", type=Path, help="also write pictures that were judged wrong into this PNG"
    )
    return parser.parse_args()


def main() -> None:
    """Draw, judge, print."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    defaults: dict[str, Any] = json.loads((arguments.checkpoint / "generation_config.json").read_text())
    sampling = Sampling(
        size=arguments.size,
        num_inference_steps=arguments.steps or defaults["num_inference_steps"],
        guidance_scale=arguments.guidance or defaults["guidance_scale"],
        batch_size=arguments.batch,
    )
    pipeline = load_pipeline(arguments.checkpoint)
    if arguments.sheet:
        contact_sheet(sample(pipeline, list(_SHEET_PROMPTS), replace(sampling, batch_size=4), 1)).save(
            arguments.sheet
        )
    if not arguments.captions:
        return
    captions = unseen_captions(arguments.captions, arguments.seed)
    started = time.monotonic()
    images = sample(pipeline, [caption for _, caption in captions], sampling, arguments.seed)
    seconds = time.monotonic() - started
    judgements = [judge(image, scene) for image, (scene, _) in zip(images, captions, strict=True)]
    is_single = [len(scene.objects) == 1 for scene, _ in captions]
    for name, wanted in (("one object", True), ("two objects", False)):
        chosen = [
            judgement for judgement, single in zip(judgements, is_single, strict=True) if single is wanted
        ]
        if chosen:
            print(f"{name} ({len(chosen)}):", summary(chosen))
    wrong = [index for index, judgement in enumerate(judgements) if not judgement.everything]
    if arguments.failures and wrong:
        contact_sheet([images[index] for index in wrong[:24]], columns=6).save(arguments.failures)
        for index in wrong[:24]:
            print(captions[index][1], "|", judgements[index])
    result = {
        "captions": len(captions),
        "size": sampling.size,
        "steps": sampling.num_inference_steps,
        "guidance": sampling.guidance_scale,
        "seconds_per_picture": round(seconds / len(captions), 2),
        **summary(judgements),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
