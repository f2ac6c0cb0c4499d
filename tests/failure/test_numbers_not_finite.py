"""A job whose numbers become NaN or infinite fails alone; its image is never a black one that succeeded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2, error_details_pb2
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Tokenizer

from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from tests.support.checkpoints import write_spoilt
from tests.support.job_calls import downloaded, drawn, events, get, refusal, submission, submit_batch
from tests.support.live_server import LiveServer, running_server
from tests.support.streams import follow, request

NAN, HUGE = "star", "triangle"
GOOD: dict[str, Any] = {"prompt": "a red circle", "seed": 5, "num_inference_steps": 4}


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)), dtype=int)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with two broken words: T5 gives NaN for one, Llama enormous states for the other."""
    demo = demo_checkpoint_path()
    t5 = T5Tokenizer.from_pretrained(demo / "tokenizer_3", local_files_only=True)
    llama = PreTrainedTokenizerFast.from_pretrained(demo / "tokenizer_4", local_files_only=True)

    def spoil_t5(weights: dict[str, Tensor]) -> None:
        (token,) = t5.encode(NAN, add_special_tokens=False)
        weights["shared.weight"][token] = float("nan")

    def spoil_llama(weights: dict[str, Tensor]) -> None:
        name = "model.embed_tokens.weight"
        weights[name] = weights[name].float()
        (token,) = llama.encode(f" {HUGE}", add_special_tokens=False)
        weights[name][token] = 1e25

    spoil = {"text_encoder_3": spoil_t5, "text_encoder_4": spoil_llama}
    return write_spoilt(demo, tmp_path_factory.mktemp("spoilt") / "demo", spoil)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[LiveServer]:
    with running_server("--model-path", str(checkpoint), "--grace-seconds", "5") as live:
        yield live


@pytest.mark.parametrize(
    ("word", "where"),
    [
        (NAN, "what T5 gives for the prompt is not finite (step 0 of 4, seed 6)"),
        (HUGE, "its latents are not finite (step 1 of 4, seed 6)"),
    ],
    ids=["prompt", "latents"],
)
def test_a_job_with_a_broken_word_fails_alone_and_the_log_says_where(
    server: LiveServer, word: str, where: str
) -> None:
    with server.stub() as stub:
        alone = downloaded(stub, drawn(stub, **GOOD).job_id)
        before, pids = server.info(), server.rank_pids()
        broken = GOOD | {"prompt": f"a red {word}", "seed": 6}
        bad, good = submit_batch(stub, *(submission(preview=True, **spec) for spec in (broken, GOOD)))
        told = events(stub, bad.job_id)
        assert [event.WhichOneof("event") for event in events(stub, good.job_id)][-1] == "succeeded"
        # Those that share a step sum in another order.
        assert np.abs(pixels(downloaded(stub, good.job_id)) - pixels(alone)).max() <= 1
        assert get(stub, good.job_id).execution.attempt == get(stub, bad.job_id).execution.attempt == 1
    assert not [event for event in told if event.HasField("preview") or event.HasField("image_chunk")]
    status = told[-1].failed.status
    assert status.code == code_pb2.INTERNAL
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    (line,) = server.logged_lines(" ERROR ", bad.job_id)
    assert f"job failed: {where} " in line
    assert f"error_id={info.metadata['error_id']}" in line
    assert "Traceback" not in server.log
    # No rank is blamed.
    assert (server.info().generation, server.rank_pids()) == (before.generation, pids)


def test_the_caller_who_waits_is_told_internal_with_an_error_id(server: LiveServer) -> None:
    with server.stub() as stub:
        call = stub.Generate(request(f"a blue {HUGE}", num_inference_steps=2))
        info = error_details_pb2.ErrorInfo()
        refusal(lambda: follow(call), grpc.StatusCode.INTERNAL, info)
    assert server.logged_lines(f"error_id={info.metadata['error_id']}")
