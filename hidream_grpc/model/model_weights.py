"""How many weights the ranks of a layout hold, from the headers of a checkpoint's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName, text_encoder_files
from hidream_grpc.model.checkpoint.weights.files import Library, StoredTensor, num_weights, read_tensors
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.prompts.assignment import assign_to_ranks

# Parts of the names of the transformer's tensors; all others are on every rank.
_DIVIDED_BY_MODEL = ("caption_projection.", ".adaLN_modulation.")
_DIVIDED_BY_EXPERTS = (".experts.",)
_DIVIDED_BY_TENSOR = (".attn1.", ".ff_t.", ".shared_experts.")


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """Numbers of weights of a checkpoint.

    Attributes:
        on_every_rank: weights of the transformer's layers that no axis divides, and of the autoencoder.
        divided_by_tensor: weights of the layers that the ranks of tensor parallel divide.
        divided_by_experts: weights of the experts, which the ranks of tensor and expert parallel divide.
        divided_by_model: weights of the layers that these and the ranks of sequence parallel together divide.
        text_encoders: weights of each text encoder, which is on one rank.
    """

    on_every_rank: int
    divided_by_tensor: int
    divided_by_experts: int
    divided_by_model: int
    text_encoders: Mapping[TextEncoderName, int]

    def without_text_encoders(self, layout: Layout) -> int:
        """The most weights that a rank holds, text encoders apart; exact to two hundredths."""
        tensor, experts = layout.tensor_parallel, layout.tensor_parallel * layout.expert_parallel
        return (
            self.on_every_rank
            + -(-self.divided_by_tensor // tensor)
            + -(-self.divided_by_experts // experts)
            + -(-self.divided_by_model // (experts * layout.sequence_parallel))
        )

    def text_encoders_of(self, layout: Layout) -> list[dict[TextEncoderName, int]]:
        """The text encoders of each rank, the largest first."""
        owners = assign_to_ranks(self.text_encoders, layout.world_size)
        names = sorted(owners, key=lambda name: -self.text_encoders[name])
        return [
            {name: self.text_encoders[name] for name in names if owners[name] == rank}
            for rank in range(layout.world_size)
        ]


def read_model_weights(model_path: Path, extra_model_path: Path | None) -> ModelWeights:
    """Count the weights of a checkpoint that `describe_checkpoint` has accepted."""
    transformer = read_tensors(model_path / "transformer", Library.DIFFUSERS)
    by_model, by_experts, by_tensor = (
        _num_weights(transformer, parts)
        for parts in (_DIVIDED_BY_MODEL, _DIVIDED_BY_EXPERTS, _DIVIDED_BY_TENSOR)
    )
    encoders = text_encoder_files(model_path, extra_model_path, num_llama_layers=1)
    return ModelWeights(
        on_every_rank=num_weights(transformer)
        - by_model
        - by_experts
        - by_tensor
        + num_weights(read_tensors(model_path / "vae", Library.DIFFUSERS)),
        divided_by_tensor=by_tensor,
        divided_by_experts=by_experts,
        divided_by_model=by_model,
        text_encoders={name: files.num_parameters for name, files in encoders.items()},
    )


def _num_weights(tensors: Mapping[str, StoredTensor], parts_of_names: tuple[str, ...]) -> int:
    return num_weights(
        {name: t for name, t in tensors.items() if any(part in name for part in parts_of_names)}
    )
