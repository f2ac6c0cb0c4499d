"""A rank reads and holds its share of the transformer, and no more at any moment."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.devices.device_types import CPU, CUDA
from hidream_grpc.model.checkpoint.configs import read_configs
from hidream_grpc.model.checkpoint.files import TransformerConfig
from hidream_grpc.model.checkpoint.hidream_i1 import HIDREAM_I1
from hidream_grpc.model.checkpoint.weights.files import Library, read_tensors
from hidream_grpc.model.checkpoint.weights.files import num_weights as num_weights_of_component
from hidream_grpc.model.checkpoint.weights.transformer import transformer_tensors
from hidream_grpc.model.costs.model import ModelCosts
from hidream_grpc.model.costs.ranks import RankPlace
from hidream_grpc.model.costs.weights import transformer_bytes
from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.planner import parse_layout
from hidream_grpc.model.parallel.shards import parameter_slices
from hidream_grpc.model.transformer.model import HiDreamTransformer
from hidream_grpc.model.weight_format import WeightFormat, is_quantized_tensor
from hidream_grpc.model.weights import SafetensorsFolder, load_share
from tests.support.checkpoints import write_promised, write_reshaped

TOLERANCE = 1.05

REAL_MODEL = HIDREAM_I1.transformer

# Embedders of patches, timesteps and pooled prompts, and the last layer: 0.12 % of the real model.
WHOLE_ON_EVERY_RANK = ("x_embedder.", "t_embedder.", "p_embedder.", "final_linear.")


def transformer_of(config: TransformerConfig, layout: str, rank: int) -> HiDreamTransformer:
    with torch.device("meta"):
        return HiDreamTransformer(config, ParallelGroups(parse_layout(layout), rank), CpuDevice())


def num_weights(transformer: HiDreamTransformer, *, routed_experts: bool | None = None) -> int:
    """The weights that are shared out; of routed experts only, or of all else only, where told so."""
    return sum(
        parameter.numel()
        for name, parameter in transformer.named_parameters()
        if not name.startswith(WHOLE_ON_EVERY_RANK)
        and (routed_experts is None or (".experts." in name) == routed_experts)
    )


@pytest.mark.parametrize("layout", ["tp=2", "tp=4", "tp=5", "tp=10"])
def test_tensor_parallel_ranks_of_the_real_model_hold_one_nth_each(layout: str) -> None:
    parsed = parse_layout(layout)
    total = num_weights(transformer_of(REAL_MODEL, "tp=1", 0))
    for rank in range(parsed.world_size):
        held = num_weights(transformer_of(REAL_MODEL, layout, rank))
        assert held <= TOLERANCE * total / parsed.world_size


@pytest.mark.parametrize("layout", ["ep=2", "ep=4", "tp=4,ep=2", "tp=2,ep=2"])
def test_expert_parallel_ranks_of_the_real_model_hold_one_nth_of_the_experts(layout: str) -> None:
    # Attention, shared experts and text run on every rank's own samples: the tensor axis alone divides them.
    parsed = parse_layout(layout)
    alone = transformer_of(REAL_MODEL, "tp=1", 0)
    experts, others = (num_weights(alone, routed_experts=routed) for routed in (True, False))
    for rank in range(parsed.world_size):
        share = transformer_of(REAL_MODEL, layout, rank)
        assert num_weights(share, routed_experts=True) <= TOLERANCE * experts / parsed.world_size
        assert num_weights(share, routed_experts=False) <= TOLERANCE * others / parsed.tensor_parallel


def test_what_every_rank_holds_of_the_real_model_is_next_to_nothing() -> None:
    alone = transformer_of(REAL_MODEL, "tp=1", 0)
    total = sum(parameter.numel() for parameter in alone.parameters())
    assert total == pytest.approx(17.1e9, rel=0.01)
    assert (total - num_weights(alone)) / total < 0.002


def test_what_is_told_from_configurations_of_a_ranks_weights_is_what_it_holds(tiny_checkpoint: Path) -> None:
    sizes = {
        "num_layers": 2,
        "num_single_layers": 3,
        "num_attention_heads": 20,
        "attention_head_dim": 128,
        "axes_dims_rope": (64, 32, 32),
        "llama_layers": [0, 1, 2, 2, 2],
    }
    folder = write_promised(tiny_checkpoint, tiny_checkpoint.parent / "promised", **sizes)
    config = msgspec.json.decode(
        (folder / "transformer" / "config.json").read_bytes(), type=TransformerConfig
    )
    costs = ModelCosts(read_configs(folder, None), CUDA)
    autoencoder = num_weights_of_component(read_tensors(folder / "vae", Library.DIFFUSERS))
    for layout in (
        "tp=1",
        "tp=2",
        "tp=5",
        "tp=10",
        "ep=2",
        "ep=4",
        "tp=4,ep=2",
        "cfg=2,dp=2,tp=2",
        "ep=2,sp=4",
    ):
        share = transformer_of(config, layout, rank=0)
        held = sum(parameter.numel() for parameter in share.parameters()) + autoencoder
        assert costs.weights_bytes(parse_layout(layout)) == held * CUDA.bytes_per_weight, layout


@pytest.mark.parametrize("layout", ["tp=1", "tp=2", "tp=4", "tp=4,ep=2", "ep=4", "cfg=2,tp=2", "sp=2,tp=2"])
def test_the_ranks_of_a_model_read_every_weight_once(layout: str, tiny_checkpoint: Path) -> None:
    folder = tiny_checkpoint / "transformer"
    config = msgspec.json.decode((folder / "config.json").read_bytes(), type=TransformerConfig)
    parsed = parse_layout(layout)
    read: dict[str, int] = {}
    for rank in range(parsed.expert_parallel * parsed.ranks_per_sample_group):
        slices = parameter_slices(transformer_of(config, layout, rank))
        with SafetensorsFolder(folder) as weights:
            for part in (part for parts in slices.values() for part in parts):
                read[part.name] = read.get(part.name, 0) + weights.read(part).numel()
            sizes = {name: tensor.num_elements for name, tensor in weights.tensors.items()}
    assert read.keys() == sizes.keys()
    for name, size in sizes.items():
        # A weight that only some of the axes divide is read once by each rank of the others.
        assert read[name] % size == 0, name


def test_what_is_read_is_what_is_held(tiny_checkpoint: Path) -> None:
    folder = tiny_checkpoint / "transformer"
    config = msgspec.json.decode((folder / "config.json").read_bytes(), type=TransformerConfig)
    for rank in range(4):
        share = transformer_of(config, "tp=2,ep=2", rank)
        bytes_read = load_share(share, folder, CpuDevice())
        assert bytes_read == sum(parameter.nbytes for parameter in share.parameters())


@pytest.mark.parametrize("weights", [WeightFormat.INT8, WeightFormat.FLOAT8])
def test_what_a_rank_holds_and_reads_of_quantized_weights_is_counted_to_the_byte(
    weights: WeightFormat, tiny_checkpoint: Path
) -> None:
    folder = tiny_checkpoint / "transformer"
    config = msgspec.json.decode((folder / "config.json").read_bytes(), type=TransformerConfig)
    shapes = transformer_tensors(config)
    for layout, rank in (("tp=1", 0), ("tp=4", 0), ("tp=4", 3), ("tp=2,ep=2", 1)):
        held = read = 0
        slices = parameter_slices(transformer_of(config, layout, rank))
        for part in (part for parts in slices.values() for part in parts):
            shape = shapes[part.name]
            num_rows = len(part.rows or range(shape[0]))
            num_inputs = math.prod(shape[1:]) if part.columns is None else len(part.columns)
            is_quantized = is_quantized_tensor(part.name)
            of_tensor = weights if is_quantized else WeightFormat.BFLOAT16
            held += of_tensor.matrix_bytes(num_rows, num_inputs, CPU.bytes_per_weight)
            # The scale of a row is that of all of its columns.
            read += num_rows * (shape[1] if is_quantized else num_inputs) * CPU.bytes_per_weight
        share = transformer_of(config, layout, rank)
        assert load_share(share, folder, CpuDevice(), weights) == read
        assert sum(parameter.nbytes for parameter in share.parameters()) == held
        place = RankPlace.of(parse_layout(layout), rank)
        assert transformer_bytes(config, place, weights, CPU.bytes_per_weight) == held


@pytest.mark.parametrize("layout", ["tp=1", "tp=10", "tp=4,ep=2"])
def test_quantized_weights_of_the_real_model_take_half_the_bytes(layout: str) -> None:
    shapes = transformer_tensors(REAL_MODEL)
    held = dict.fromkeys((WeightFormat.BFLOAT16, WeightFormat.INT8), 0)
    for parts in parameter_slices(transformer_of(REAL_MODEL, layout, 0)).values():
        for part in (part for part in parts if is_quantized_tensor(part.name)):
            shape = shapes[part.name]
            for weights in held:
                held[weights] += weights.matrix_bytes(
                    len(part.rows or range(shape[0])), len(part.columns or range(shape[1])), 2
                )
    assert held[WeightFormat.BFLOAT16] > 3e9
    assert held[WeightFormat.INT8] <= 0.52 * held[WeightFormat.BFLOAT16]


_LOAD_WITH_LITTLE_ROOM = """
import json, resource, sys
from pathlib import Path
import msgspec
from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.model.weights import load_share
from tests.numerics.test_shares import TransformerConfig, transformer_of

folder, layout, room_bytes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
config = msgspec.json.decode((folder / "config.json").read_bytes(), type=TransformerConfig)
share = transformer_of(config, layout, 0)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
limit = int(status["VmData"].split()[0]) * 1024 + room_bytes
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    read = load_share(share, folder, CpuDevice())
except (MemoryError, RuntimeError) as error:
    sys.exit("no room: " + str(error))
print(json.dumps({"held": sum(parameter.nbytes for parameter in share.parameters()), "read": read}))
"""


def load_with_room_for(room_bytes: float, folder: Path, layout: str) -> subprocess.CompletedProcess[str]:
    """Load rank 0's share in a process that can allocate only so much more."""
    return subprocess.run(
        [sys.executable, "-c", _LOAD_WITH_LITTLE_ROOM, str(folder), layout, str(int(room_bytes))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.long
def test_a_loading_rank_never_holds_more_than_its_share_and_one_slice(tiny_checkpoint: Path) -> None:
    large = {"num_attention_heads": 8, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
    folder = write_reshaped(tiny_checkpoint, tiny_checkpoint.parent / "large", **large) / "transformer"
    file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert file_bytes > 100e6
    # The mapping of the file counts as if it were written to, which it is not.
    room_bytes = file_bytes + 0.4 * file_bytes
    loaded = load_with_room_for(room_bytes, folder, "tp=4")
    assert loaded.returncode == 0, loaded.stderr
    share = json.loads(loaded.stdout)
    assert share["held"] == share["read"]
    assert file_bytes / 4 <= share["read"] <= TOLERANCE * file_bytes / 4 + 3e6
    whole = load_with_room_for(room_bytes, folder, "tp=1")
    assert "no room" in whole.stderr
    assert whole.returncode != 0
