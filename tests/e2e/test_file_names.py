"""Every file and folder of a server may have any name that the file system allows."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from tests.support.file_names import ALL_IN_ONE
from tests.support.live_server import running_server
from tests.support.streams import follow, request


def test_a_server_with_odd_names_for_everything_draws_and_keeps_what_it_drew(tmp_path: Path) -> None:
    folder = tmp_path / ALL_IN_ONE
    model, llama, data = (folder / name for name in ("model", "llama", "data"))
    shutil.copytree(demo_checkpoint_path(), model)
    for part in ("text_encoder_4", "tokenizer_4"):
        (model / part).rename(folder / part)
    shutil.copytree(folder / "text_encoder_4", llama)
    shutil.copytree(folder / "tokenizer_4", llama, dirs_exist_ok=True)
    (folder / "tokens").write_text("alice token-of-alice-0123456789\n", encoding="utf-8")
    (folder / "config.toml").write_text("max_num_images = 1\n", encoding="utf-8")
    flags = (
        *("--model-path", str(model), "--extra-model-path", str(llama), "--data-dir", str(data)),
        *("--artifacts", (folder / "images of jobs").as_uri(), "--log-file", str(folder / "server.log")),
        *("--tokens-file", str(folder / "tokens"), "--config", str(folder / "config.toml")),
        *("--devices", "0"),
    )
    with (
        # Not below the folder of the test, whose name leaves no room for that of a socket.
        tempfile.TemporaryDirectory(prefix="t", suffix=ALL_IN_ONE) as temporary,
        running_server(*flags, environment={"TMPDIR": temporary}) as server,
        server.stub() as stub,
    ):
        metadata = (("authorization", "Bearer token-of-alice-0123456789"),)
        drawn = follow(stub.Generate(request(num_inference_steps=1), metadata=metadata))
    assert drawn.images
    assert {path.name for path in data.iterdir()} >= {"jobs.sqlite"}
    (image,) = (path for path in (folder / "images of jobs" / "images").rglob("*") if path.is_file())
    assert [image.read_bytes()] == drawn.images
    assert "loaded in" in (folder / "server.log").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == [ALL_IN_ONE]
