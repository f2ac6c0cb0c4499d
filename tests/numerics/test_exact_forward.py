"""Our forward is the library's, with less work: each saving by itself, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from diffusers.models.transformers import transformer_hidream_image
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.model.checkpoint.files import TransformerConfig
from hidream_grpc.model.parallel.groups import Axis, ParallelGroups
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.transformer.conditioning import Conditioning
from hidream_grpc.model.transformer.model import (
    AttentionWeights,
    DoubleBlock,
    HiDreamTransformer,
    RankRows,
)
from hidream_grpc.model.transformer.patches import TokenGrid
from hidream_grpc.model.weights import load_share
from tests.support.checkpoints import write_reshaped

TOLERANCE = 1e-10

T5_TOKENS, LLAMA_TOKENS = 5, 7


class DoublePrecisionCpu(CpuDevice):
    dtype = torch.float64


class MetaDevice(CpuDevice):
    """Kernels that know shapes only: on it nothing can be read by the host."""

    torch_device = torch.device("meta")

    def grouped_linear(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:  # type: ignore[override]
        assert ends.shape == weights.shape[:1]
        return rows.new_empty(rows.shape[0], weights.shape[1])


@pytest.fixture(autouse=True)
def library_rotates_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library rounds queries and keys to float32 there, which would hide all else."""

    def apply_rope(query: Tensor, key: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        def rotate(x: Tensor) -> Tensor:
            pairs = x.reshape(*x.shape[:-1], -1, 1, 2)
            return (rotation[..., 0] * pairs[..., 0] + rotation[..., 1] * pairs[..., 1]).reshape(x.shape)

        return rotate(query), rotate(key)

    monkeypatch.setattr(transformer_hidream_image, "apply_rope", apply_rope)


SHAPES: dict[str, dict[str, Any]] = {
    "real proportions": {"num_layers": 2, "num_single_layers": 3, "llama_layers": [0, 2, 2, 2, 2]},
    "three of six experts": {
        "num_attention_heads": 3,
        "num_routed_experts": 6,
        "num_activated_experts": 3,
    },
    "half the channels rotated": {"attention_head_dim": 16},
    "double blocks only": {"num_layers": 2, "num_single_layers": 0},
}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Iterator[Path]:
    target = tiny_checkpoint.parent / f"exact {request.param}"
    yield write_reshaped(tiny_checkpoint, target, **SHAPES[request.param]) / "transformer"


@pytest.fixture(scope="module")
def library(folder: Path) -> HiDreamImageTransformer2DModel:
    return HiDreamImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def ours(folder: Path) -> HiDreamTransformer:
    device = DoublePrecisionCpu()
    transformer = on_meta(folder, device)
    load_share(transformer, folder, device)
    return transformer


class WithoutTensorsFromTheHost(TorchFunctionMode):
    """Raises where a list of the host becomes a tensor; for the modules that it is put around."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.num_calls = 0
        for module in modules:
            module.register_forward_pre_hook(lambda _module, _inputs: self._enter())
            module.register_forward_hook(lambda _module, _inputs, _output: self._leave())

    def _enter(self) -> None:
        self.__enter__()

    def _leave(self) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        _types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.num_calls += 1
        assert function not in {torch.tensor, torch.as_tensor, torch.from_numpy}
        if function in {Tensor.__getitem__, Tensor.__setitem__}:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list) for part in index), index
        return function(*args, **(kwargs or {}))


def on_meta(
    folder: Path, device: CpuDevice, groups: ParallelGroups | None = None, **changes: Any
) -> HiDreamTransformer:
    config = msgspec.json.decode((folder / "config.json").read_bytes(), type=TransformerConfig)
    with torch.device("meta"):
        return HiDreamTransformer(
            msgspec.structs.replace(config, **changes), groups or ParallelGroups(Layout()), device
        )


class Inputs:
    """Two samples at different steps, with prompts of their own."""

    def __init__(self, height: int, width: int, num_layers: int) -> None:
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.latents = random(2, 16, height, width)
        self.timesteps = torch.tensor([700.0, 31.0])
        self.t5 = random(2, T5_TOKENS, 32)
        self.llama = random(num_layers, 2, LLAMA_TOKENS, 32)
        self.pooled = random(2, 40)


@torch.inference_mode()
def predict(transformer: HiDreamTransformer, inputs: Inputs) -> Tensor:
    conditioning = tuple(
        Conditioning(
            transformer.embed_pooled(inputs.pooled[row]),
            *transformer.project_captions(inputs.t5[row], inputs.llama[:, row]),
        )
        for row in range(2)
    )
    time_and_prompt = transformer.embed_timesteps(inputs.timesteps) + torch.stack(
        [each.pooled for each in conditioning]
    )
    return transformer(RankRows(inputs.latents, time_and_prompt, conditioning, None))


@torch.no_grad()
def library_predict(library: HiDreamImageTransformer2DModel, inputs: Inputs) -> Tensor:
    layers = sorted(set(library.config.llama_layers))
    prediction: Tensor = library(
        hidden_states=inputs.latents,
        timesteps=inputs.timesteps,
        encoder_hidden_states_t5=inputs.t5,
        encoder_hidden_states_llama3=dict(zip(layers, inputs.llama, strict=True)),
        pooled_embeds=inputs.pooled,
        return_dict=False,
    )[0]
    return prediction


def assert_exact(mine: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(mine, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def num_llama_layers(library: HiDreamImageTransformer2DModel) -> int:
    return len(set(library.config.llama_layers))


@pytest.mark.parametrize(("height", "width"), [(8, 12), (12, 8), (4, 16), (2, 4)], ids=lambda side: str(side))
def test_one_padding_token_stands_for_all(
    height: int, width: int, ours: HiDreamTransformer, library: HiDreamImageTransformer2DModel
) -> None:
    inputs = Inputs(height, width, num_llama_layers(library))
    assert_exact(predict(ours, inputs), library_predict(library, inputs))


@pytest.mark.parametrize("side", [2, 8, 16])
def test_llamas_tokens_need_keys_and_values_only(
    side: int, ours: HiDreamTransformer, library: HiDreamImageTransformer2DModel
) -> None:
    inputs = Inputs(side, side, num_llama_layers(library))
    assert_exact(predict(ours, inputs), library_predict(library, inputs))


@torch.no_grad()
def test_a_prompt_is_projected_once_for_all_its_steps(
    ours: HiDreamTransformer, library: HiDreamImageTransformer2DModel
) -> None:
    inputs = Inputs(2, 2, num_llama_layers(library))
    t5, llama = ours.project_captions(inputs.t5[0], inputs.llama[:, 0])
    assert_exact(t5, library.caption_projection[-1](inputs.t5[0]))
    layers = sorted(set(library.config.llama_layers))
    for block, layer in enumerate(library.config.llama_layers):
        expected = library.caption_projection[block](inputs.llama[layers.index(layer), 0])
        assert_exact(llama[block], expected)


@torch.no_grad()
def test_timesteps_are_embedded_once_for_a_schedule(
    ours: HiDreamTransformer, library: HiDreamImageTransformer2DModel
) -> None:
    timesteps = torch.tensor([1000.0, 731.5, 0.0])
    assert_exact(ours.embed_timesteps(timesteps), library.t_embedder(timesteps, torch.float64))


@torch.no_grad()
def test_positions_depend_on_the_size_alone(library: HiDreamImageTransformer2DModel) -> None:
    _, _, _, positions = library.patchify(torch.zeros(1, 16, 8, 12))
    expected = library.pe_embedder(positions)[0, :96, 0]
    grid = TokenGrid.new(4, 6, 2, 1, 64, Axis("sequence"), library.pe_embedder, torch.device("cpu"))
    assert grid.padding_count == 40
    assert torch.equal(grid.cosines[1:25], expected[:24, :, 0, 0])
    assert torch.equal(grid.sines[1:25], expected[:24, :, 1, 0])
    for alone in (0, *range(25, 28)):
        assert grid.cosines[alone].eq(1).all()
        assert grid.sines[alone].eq(0).all()


@torch.no_grad()
def test_grouped_experts_give_what_the_librarys_loop_gives(
    ours: HiDreamTransformer, library: HiDreamImageTransformer2DModel
) -> None:
    expected: MOEFeedForwardSwiGLU = library.double_stream_blocks[0].block.ff_i
    tokens = torch.randn(2, 50, ours.config.width, dtype=torch.float64)
    block = cast(DoubleBlock, ours.double_blocks[0])
    assert_exact(block.ff_i(tokens, None), expected(tokens))


@torch.no_grad()
def test_one_product_gives_queries_keys_and_values(
    ours: HiDreamTransformer, library: HiDreamImageTransformer2DModel
) -> None:
    attention = library.double_stream_blocks[0].block.attn1
    tokens = torch.randn(2, 9, ours.config.width, dtype=torch.float64)
    fused = cast(AttentionWeights, cast(DoubleBlock, ours.double_blocks[0]).attn1.streams[1]).query_key_value
    for mine, theirs in zip(
        fused(tokens), (attention.to_q_t, attention.to_k_t, attention.to_v_t), strict=True
    ):
        assert_exact(mine, theirs(tokens))
    for mine, whole in zip(fused(tokens, first_layer=1), fused(tokens)[1:], strict=True):
        assert_exact(mine, whole)


@torch.inference_mode()
@pytest.mark.parametrize("width", [8, 12], ids=["square", "wide"])
def test_no_step_waits_for_a_result_on_the_device(width: int, folder: Path) -> None:
    # A meta tensor has no values: whoever reads one on the host raises.
    transformer = on_meta(folder, MetaDevice())
    assert predict_on_meta(transformer, 8, width).shape == (1, 16, 8, width)


@torch.inference_mode()
def test_no_block_with_padded_samples_copies_their_indices_from_the_host(folder: Path) -> None:
    groups = ParallelGroups(Layout(expert_parallel=2))
    transformer = on_meta(folder, MetaDevice(), groups)
    watched = WithoutTensorsFromTheHost([*transformer.double_blocks, *transformer.single_blocks])
    with groups.without_collectives():
        predict_on_meta(transformer, 8, 8, num_groups=2, unpadded_samples=(0,))
    assert watched.num_calls > 0


@torch.inference_mode()
def test_a_rank_without_a_token_of_the_image_takes_part_in_a_step(folder: Path) -> None:
    groups = ParallelGroups(Layout(expert_parallel=2, sequence_parallel=5), rank=4)
    transformer = on_meta(folder, MetaDevice(), groups, num_attention_heads=5)
    with groups.without_collectives():
        assert predict_on_meta(transformer, 2, 2, num_groups=2).shape == (1, 16, 2, 2)


def predict_on_meta(
    transformer: HiDreamTransformer,
    height: int,
    width: int,
    num_groups: int = 1,
    unpadded_samples: tuple[int, ...] | None = None,
) -> Tensor:
    blocks, dim = transformer.config.num_blocks, transformer.config.width
    with torch.device("meta"):
        conditioning = Conditioning(
            torch.empty(dim), torch.empty(T5_TOKENS, dim), torch.empty(blocks, LLAMA_TOKENS, dim)
        )
        rows = RankRows(
            torch.empty(1, 16, height, width), torch.empty(num_groups, dim), (conditioning,), unpadded_samples
        )
        prediction: Tensor = transformer(rows)
        return prediction
