"""The running service's images show what the prompt says, judged by their content."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from hidream.v1 import image_gen_pb2_grpc
from scripts.demo_model.captions import Scene, simple_scene
from scripts.demo_model.judge import judge
from tests.support.streams import follow, request

PROMPTS = {
    "红色圆形在蓝色背景上": simple_scene("red", "circle", "blue"),
}
OTHER_PROMPTS = {
    "a red circle on a blue background": simple_scene("red", "circle", "blue"),
    "a green square on a white background": simple_scene("green", "square", "white"),
    "a yellow star on a black background": simple_scene("yellow", "star", "black"),
    "a white circle on a green background": simple_scene("white", "circle", "green"),
}
SEEDS = (1, 2, 3)


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        *PROMPTS.items(),
        *(
            pytest.param(*prompt_and_scene, marks=pytest.mark.long)
            for prompt_and_scene in OTHER_PROMPTS.items()
        ),
    ],
)
def test_the_image_shows_the_colours_that_the_prompt_names_where_it_says(
    stub: image_gen_pb2_grpc.ImageGenStub, prompt: str, scene: Scene
) -> None:
    generate = request(prompt, seed=SEEDS[0], num_images=len(SEEDS))
    # The demo model's own size, steps and guidance.
    generate.spec.ClearField("width")
    generate.spec.ClearField("height")
    images = follow(stub.Generate(generate)).images
    judgements = []
    for data in images:
        with Image.open(io.BytesIO(data)) as image:
            judgements.append(judge(image, scene))
    right = [judgement.background and judgement.colour_and_position for judgement in judgements]
    # The model is right in most images, not in all: scripts/demo_model/README.md has the figures.
    assert sum(right) >= len(SEEDS) - 1, judgements
