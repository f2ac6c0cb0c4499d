"""What an operator gets who names steps to compile for."""

from __future__ import annotations

import os
import re
import signal

import pytest

from hidream.v1 import job_pb2
from tests.support.live_server import running_server, wait_until
from tests.support.streams import follow, request


@pytest.mark.long
def test_every_rank_compiles_for_the_named_steps_when_it_has_loaded_also_one_that_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What the compiler itself does takes a minute; tests/numerics/test_compilation.py looks at that.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with running_server("--devices", "0,1", "--compile-shapes", "128x128x2,64x128x1") as server:

        def compiled() -> list[tuple[str, str]]:
            return re.findall(r"compiled steps of (\S+) in .* rank=(\d+)", server.log)

        assert sorted(compiled()) == sorted(
            (shape, rank) for shape in ("128x128x2", "64x128x1") for rank in "01"
        )
        os.kill(server.rank_pids()[1], signal.SIGKILL)
        wait_until(lambda: len(compiled()) == 6, 60, "the new rank has compiled")
        assert compiled()[4:] == [("128x128x2", "1"), ("64x128x1", "1")]
        server.wait_until_serving()
        with server.stub() as stub:
            stream = follow(stub.Generate(request(num_inference_steps=2)))
        assert stream.job.state == job_pb2.JOB_STATE_SUCCEEDED
