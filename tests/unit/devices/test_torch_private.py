"""The installed torch has the private names that a rank depends on, and they do what is needed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hidream_grpc.devices import torch_private


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """A process group that follows one whose init failed."""
    distributed_c10d._world.group_count = 7
    torch_private.reset_group_count()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_the_timeout_of_collectives_can_be_changed_after_the_init() -> None:
    torch_private.set_collective_timeout(timedelta(seconds=3))
    backend = distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    assert backend.options._timeout == timedelta(seconds=3)


@pytest.mark.usefixtures("group_of_one")
def test_the_next_group_is_numbered_as_the_first_again() -> None:
    assert distributed_c10d._world.group_count == 1


def test_the_flash_kernel_returns_log_sum_exp_next_to_the_values() -> None:
    schema = torch.ops.aten._scaled_dot_product_flash_attention.default._schema
    assert [argument.name for argument in schema.arguments][:3] == ["query", "key", "value"]
    assert [result.name for result in schema.returns][:2] == ["output", "logsumexp"]


def test_compilation_beyond_the_limit_fails_instead_of_running_uncompiled() -> None:
    @torch.compile(dynamic=False, backend="eager")
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    with torch_private.strict_compilation(max_graphs=1):
        double(torch.ones(2))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            double(torch.ones(3))
    torch._dynamo.reset()
