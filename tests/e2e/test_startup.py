"""What an operator relies on when the service starts, or cannot."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from tests.e2e.conftest import NarrowServer
from tests.support.live_server import LiveServer, running_server
from tests.support.refused_starts import refused_line, refused_line_here


@pytest.fixture(autouse=True)
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a server would keep its jobs that starts in the process of the tests."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data home"))


def test_a_port_in_use_is_told_before_anything_is_loaded(server: LiveServer) -> None:
    line = refused_line(["--listen", server.address])
    assert line == f"hidream-grpc: --listen: {server.address} is already in use by another process"


def test_a_metrics_port_in_use_is_told_before_anything_is_loaded(server: LiveServer) -> None:
    line = refused_line_here(["--listen", "127.0.0.1:0", "--metrics-port", str(server.metrics_port)])
    assert line.startswith("hidream-grpc: --metrics-port: ")
    assert "already in use" in line


def test_a_data_folder_has_one_server_at_a_time(narrow_server: NarrowServer) -> None:
    line = refused_line_here(["--listen", "127.0.0.1:0", "--data-dir", narrow_server.data_dir])
    jobs_file = narrow_server.data_dir / "jobs.sqlite"
    assert line == f"hidream-grpc: --data-dir: {jobs_file} is in use by another server"
    narrow_server.live.info()


BAD_FLAGS: dict[str, tuple[list[str], list[str]]] = {
    "no such model": (["-m", "/no/such/model"], ["--model-path", "/no/such/model", "no such folder"]),
    "a model folder without a model": (["-m", "/dev"], ["--model-path", "/dev"]),
    "no such Llama": (["-e", "/no/such/llama"], ["--extra-model-path", "/no/such/llama"]),
    "no such tokens": (
        ["--tokens-file", "/no/such/file"],
        ["--tokens-file", "/no/such/file", "No such file"],
    ),
    "unknown flag": (["--no-such-flag"], ["--no-such-flag"]),
    "flag without its value": (["--devices"], ["--devices", "argument"]),
    "an argument too many": (["model"], ["unexpected extra argument"]),
    "no number": (["--max-queued-jobs", "many"], ["--max-queued-jobs", "integer"]),
    "out of range": (["--max-num-images", "0"], ["--max-num-images", "1"]),
    "unknown choice": (["--log-level", "LOUD"], ["--log-level", "DEBUG"]),
    "device list": (["-d", "0-x"], ["--devices", "0-x"]),
    "device twice": (["-d", "0,1,0"], ["--devices", "twice"]),
    "no layout": (["--layout", "tp=2,pp=2"], ["--layout: 'pp=2'", "tp, ep, cfg, sp, dp"]),
    "layout that the model forbids": (
        ["-d", "0-7", "--layout", "tp=8"],
        ["--layout: tp=8 does not divide 4 attention heads; tp=4,ep=2 or tp=4 would work on 8 devices"],
    ),
    "layout for more devices": (
        ["-d", "0,1", "--layout", "tp=2,cfg=2"],
        ["--layout: tp=2,cfg=2 needs 4 devices, there are 2; cfg=2 or tp=2 would work on 2 devices"],
    ),
    "no shape to compile": (
        ["--compile-shapes", "512x512"],
        ["--compile-shapes: '512x512'", "width x height x samples, such as 1024x1024x2"],
    ),
    "a shape that the model forbids": (
        ["--compile-shapes", "256x256x2,1000x1000x2"],
        ["--compile-shapes: 1000x1000 cannot be generated: both sides must be multiples of 16"],
    ),
    "unknown device type": (["-t", "tpu"], ["--device-type", "tpu", "npu, cuda, cpu"]),
    "listen without a port": (["--listen", "localhost"], ["--listen", "HOST:PORT"]),
    "listen with a broken IPv6 address": (["--listen", "[::1:80"], ["--listen", "brackets"]),
    "port out of range": (["--listen", "127.0.0.1:65536"], ["--listen", "HOST:PORT"]),
    "address of another machine": (["--listen", "192.0.2.1:0"], ["--listen", "192.0.2.1:0"]),
    "metrics port out of range": (["--metrics-port", "65536"], ["--metrics-port", "65535"]),
    "data folder": (["--data-dir", "/proc/no/such"], ["--data-dir", "/proc/no/such"]),
    "log file": (["--log-file", "/proc/no/such"], ["--log-file", "/proc/no/such"]),
    "no such config file": (["--config", "/no/such.toml"], ["--config", "/no/such.toml"]),
}


@pytest.mark.parametrize(("flags", "words"), BAD_FLAGS.values(), ids=list(BAD_FLAGS))
def test_whatever_is_wrong_with_a_flag_is_one_line_that_names_it(flags: list[str], words: list[str]) -> None:
    line = refused_line_here(["--listen", "127.0.0.1:0", *flags] if "--listen" not in flags else flags)
    assert all(word in line for word in words), line


def test_a_checkpoint_that_is_not_what_it_says_is_one_line_before_any_rank_starts(tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(demo_checkpoint_path(), tmp_path / "checkpoint"))
    weights = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    scale = {"final_layer.linear.scale_weight": np.ones((), np.float32)}
    save_file(load_file(weights) | scale, weights)
    assert refused_line_here(["-m", checkpoint]) == (
        f"hidream-grpc: -m/--model-path: {weights}: final_layer.linear.scale_weight: quantized weights;"
        " take those that are not quantized"
    )


@pytest.mark.parametrize("device_type", ["npu", "cuda"])
def test_a_device_type_that_is_absent_is_one_line(device_type: str) -> None:
    if any(Path("/dev").glob({"npu": "davinci[0-9]*", "cuda": "nvidia[0-9]*"}[device_type])):
        pytest.skip(f"this machine has {device_type} devices")
    line = refused_line_here(["-t", device_type])
    assert line.startswith(f"hidream-grpc: --device-type: {device_type} asked for, but ")


def test_a_wrong_line_of_the_tokens_is_told_by_its_number_and_without_the_token(tmp_path: Path) -> None:
    tokens_file = tmp_path / "tokens"
    tokens_file.write_text("# callers\nalice a-secret-of-hers and more\n", encoding="utf-8")
    line = refused_line_here(["--tokens-file", tokens_file])
    assert line == f"hidream-grpc: --tokens-file: {tokens_file}, line 2: must be a name and a token"


def test_a_bad_environment_variable_is_one_line_that_names_it() -> None:
    line = refused_line([], {"HIDREAM_MAX_NUM_IMAGES": "lots"})
    assert line.startswith("hidream-grpc: HIDREAM_MAX_NUM_IMAGES: ")


@pytest.mark.parametrize(
    "content",
    ["max_num_images = 'lots'", "max_nun_images = 1", "max_num_images"],
    ids=["type", "key", "syntax"],
)
def test_a_bad_config_file_is_one_line_that_names_it(tmp_path: Path, content: str) -> None:
    config_file = tmp_path / "hidream.toml"
    config_file.write_text(content, encoding="utf-8")
    line = refused_line_here(["--config", config_file])
    assert str(config_file) in line


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--tokens-file", "--tokens-file: {}: is no regular file"),
        ("--log-file", "--log-file: cannot append to {}: it is no regular file"),
    ],
)
def test_a_pipe_where_a_file_should_be_is_told_and_not_waited_for(
    flag: str, reason: str, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    line = refused_line_here(["--listen", "127.0.0.1:0", flag, pipe])
    assert line == f"hidream-grpc: {reason.format(pipe)}"


def test_sigterm_ends_a_start_that_waits_for_a_silent_database(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # Much longer than the test waits.
        url = f"postgresql://u:p@127.0.0.1:{silent.getsockname()[1]}/jobs?connect_timeout=600"
        command = [sys.executable, "-m", "hidream_grpc", "serve", "--listen", "127.0.0.1:0", "--store", url]
        with subprocess.Popen(
            [*command, "--data-dir", tmp_path], stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                silent.settimeout(60)
                connection, _ = silent.accept()
                with connection:
                    process.send_signal(signal.SIGTERM)
                    _, log = process.communicate(timeout=60)
            finally:
                process.kill()
    (line,) = log.splitlines()
    assert (process.returncode, line.partition(": ")[2]) == (0, "stopped before the start was done")


def test_too_long_a_folder_for_temporary_files_is_told_before_the_server_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    line = refused_line_here(["--listen", "127.0.0.1:0", "--data-dir", tmp_path / "data"])
    assert line == f"hidream-grpc: TMPDIR: {deep} is too long a path for a Unix socket in it"


def test_importing_the_server_imports_no_torch() -> None:
    code = (
        "import sys, hidream_grpc.cli, hidream_grpc.server.app\n"
        "print(*sorted({'torch', 'torch_npu', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported.stdout == "\n"


# By default servers are forks of a process that has imported torch.
@pytest.mark.long
def test_the_running_server_holds_no_torch_and_its_ranks_do(server: LiveServer) -> None:
    def maps_torch(pid: int) -> bool:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")

    assert not maps_torch(server.pid)
    assert all(maps_torch(pid) for pid in server.rank_pids())


def test_devices_that_no_layout_fits_are_told_and_stay_idle() -> None:
    with running_server("--devices", "0-2", wait=False) as loading:
        info = loading.info()
    assert (info.layout, list(info.idle_devices)) == ("tp=2", [2])
    assert "layout tp=2 leaves devices idle: 2" in loading.log
    assert "rank 2 is process" not in loading.log
