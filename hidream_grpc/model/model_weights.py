"""How many weights the ranks of a layout hold, from the headers of a checkpoint's files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName, text_encoder_files
from hidream_grpc.model.checkpoint.weights.files import Library, StoredTensor, num_weights, read_tensors
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.prompts.assignment import assign_to_ranks
from hidream_grpc.model.weight_format import WeightFormat, is_quantized_tensor

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
        exact_of_text_encoders: those of them to which no format with fewer bits applies, as of embeddings;
            the transformer's are those on every rank, to a hundredth.
    """

    on_every_rank: int
    divided_by_tensor: int
    divided_by_experts: int
    divided_by_model: int
    text_encoders: Mapping[TextEncoderName, int]
    exact_of_text_encoders: Mapping[TextEncoderName, int] = field(default_factory=dict)

    def without_text_encoders(self, layout: Layout) -> int:
        """The most weights that a rank holds, text encoders apart; exact to two hundredths."""
        tensor, experts = layout.tensor_parallel, layout.tensor_parallel * layout.expert_parallel
        return (
            self.on_every_rank
            + -(-self.divided_by_tensor // tensor)
            + -(-self.divided_by_experts // experts)
            + -(-self.divided_by_model // (experts * layout.sequence_parallel))
        )

    def bytes_without_text_encoders(self, layout: Layout, weights: WeightFormat, exact: int) -> int:
        """The most bytes of weights that a rank holds, text encoders apart; exact to two hundredths.

        Args:
            layout: the layout of all ranks.
            weights: format of the transformer.
            exact: bytes of a weight in the dtype in which the model computes.
        """
        num_divided = self.without_text_encoders(layout) - self.on_every_rank
        return self.on_every_rank * exact + num_divided * weights.bytes_per_weight(exact)

    def text_encoder_bytes(self, name: TextEncoderName, weights: WeightFormat, exact: int) -> int:
        """Bytes of a text encoder in a format; exact to a hundredth.

        Args:
            name: one of the text encoders.
            weights: format of the text encoders.
            exact: bytes of a weight in the dtype in which it computes.
        """
        num_exact = self.exact_of_text_encoders.get(name, 0)
        return num_exact * exact + (self.text_encoders[name] - num_exact) * weights.bytes_per_weight(exact)

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
        exact_of_text_encoders={
            name: sum(
                math.prod(shape) for tensor, shape in files.shapes.items() if not is_quantized_tensor(tensor)
            )
            for name, files in encoders.items()
        },
    )


def _num_weights(tensors: Mapping[str, StoredTensor], parts_of_names: tuple[str, ...]) -> int:
    return num_weights(
        {name: t for name, t in tensors.items() if any(part in name for part in parts_of_names)}
    )
