"""Everything that an operator can set: flag > environment (`HIDREAM_…`) > file > default.

Below `cli.py` and `server/app.py` nobody sees these settings: each layer takes a small frozen value.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from hidream_grpc.engine.group.config import GroupTimeouts
from hidream_grpc.errors import ConfigurationError

ENVIRONMENT_PREFIX = "HIDREAM_"
VARIABLES_OF_CLIENTS = frozenset({"HIDREAM_ADDRESS", "HIDREAM_CA_FILE", "HIDREAM_TLS", "HIDREAM_TOKEN"})

_TIMEOUTS = GroupTimeouts()

PositiveInt = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]


def _not_blank(value: Any) -> Any:
    """Refuse an empty text: what is not to be set is left out.

    Else a manifest's `${UNSET}` would give each replica a store of its own, without a word.
    """
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty; leave it out to have its default")
    return value


def _path_text(value: Any) -> Any:
    """Refuse what is no path, and a `~` that no shell has expanded; every other name is taken as it is."""
    if not isinstance(value, str):
        return value
    if value.startswith("~"):
        raise ValueError(f"{value!r}: only a shell expands ~; write the whole path, or ./~ for such a name")
    if "\0" in value:
        raise ValueError(f"{value!r} is no path")
    return value


PathSetting = Annotated[Path, BeforeValidator(_path_text)]
"""Of a file or folder, relative to the working folder of the server, wherever it is set."""


class Settings(BaseSettings):
    """The settings of one server; every field is also a flag of `hidream-grpc serve`."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, frozen=True, extra="forbid")

    model_path: Annotated[
        PathSetting | None,
        Field(description="HiDream-I1 in diffusers format; the built-in demo model when absent"),
    ] = None
    extra_model_path: Annotated[
        PathSetting | None, Field(description="Llama-3.1-8B-Instruct, where the checkpoint holds none")
    ] = None
    device_type: Annotated[str, Field(description="auto, npu, cuda or cpu")] = "auto"
    devices: Annotated[
        str | None, Field(description="one rank each, such as 0,1,2,3 or 0-3; on a CPU any numbers")
    ] = None
    layout: Annotated[
        str | None,
        Field(description="how the ranks share the work, such as tp=4,ep=2; planned when absent"),
    ] = None
    threads_per_rank: Annotated[
        int | None, Field(ge=1, le=1024, description="CPU threads of each rank; cores ÷ ranks when absent")
    ] = None
    compile_shapes: Annotated[
        str | None,
        Field(description="steps to compile for at boot, width x height x samples: 1024x1024x2,768x1360x2"),
    ] = None
    replace: Annotated[
        Literal["one", "all"] | None,
        Field(description="which ranks to start anew when one dies: all on npu and cuda, one on cpu"),
    ] = None
    load_timeout_seconds: Annotated[Seconds, Field(description="time for a rank to load and compile")] = (
        _TIMEOUTS.load_seconds
    )
    collective_timeout_seconds: Annotated[
        Seconds, Field(description="time for the ranks to exchange a step's results")
    ] = _TIMEOUTS.collective_seconds

    listen: Annotated[str, Field(description="HOST:PORT to serve gRPC on; port 0 takes a free one")] = (
        "0.0.0.0:8088"
    )
    tokens_file: Annotated[
        PathSetting | None,
        Field(description="callers, a name and a bearer token a line; everybody may call when absent"),
    ] = None
    metrics_port: Annotated[
        int | None, Field(ge=0, le=65_535, description="port for Prometheus; none when absent")
    ] = None
    data_dir: Annotated[
        PathSetting | None,
        Field(description="folder of jobs and images; $XDG_DATA_HOME/hidream-grpc when absent"),
    ] = None
    store: Annotated[
        str | None,
        Field(description="postgresql://… shared by replicas; SQLite in --data-dir when absent"),
    ] = None
    store_outage_seconds: Annotated[
        float,
        Field(ge=0.1, le=3600, description="health waits so long for a store that refuses everything"),
    ] = 10.0
    lease_seconds: Annotated[
        float, Field(ge=1, le=3600, description="after so long without news another replica takes a job")
    ] = 15.0

    artifacts: Annotated[
        str | None,
        Field(description="s3://BUCKET/PREFIX or file:///FOLDER for images; in --data-dir when absent"),
    ] = None

    max_queued_jobs: Annotated[int, Field(ge=1, le=1_000_000, description="jobs that may wait")] = 64
    max_running_jobs: Annotated[int, Field(ge=1, le=1024, description="jobs drawn at the same time")] = 16
    max_queued_jobs_per_caller: Annotated[
        int | None,
        Field(ge=1, le=1_000_000, description="jobs of one caller that may wait; as all when absent"),
    ] = None
    max_running_jobs_per_caller: Annotated[
        int | None,
        Field(ge=1, le=1024, description="jobs of one caller drawn at the same time; as all when absent"),
    ] = None
    max_pixel_steps_per_minute_per_caller: Annotated[
        int | None,
        Field(
            ge=1,
            le=2**63 - 1,
            description="width × height × steps × images that one caller may ask for within any minute; "
            "any number when absent",
        ),
    ] = None
    max_step_pixels: Annotated[
        int, Field(ge=4096, description="width × height × samples of one forward of the transformer")
    ] = 8 * 1024 * 1024
    max_streams: Annotated[int, Field(ge=1, le=100_000, description="streams open at the same time")] = 1000
    max_streams_per_caller: Annotated[
        int, Field(ge=1, le=100_000, description="streams of one caller open at the same time")
    ] = 200
    max_num_images: Annotated[int, Field(ge=1, le=64, description="images of one request")] = 8
    max_num_inference_steps: Annotated[int, Field(ge=1, le=1000, description="steps of one request")] = 150
    max_guidance_scale: Annotated[float, Field(gt=0, le=100, description="largest guidance scale")] = 20.0
    max_prompt_bytes: Annotated[int, Field(ge=16, le=65_536, description="bytes of a prompt")] = 4096
    max_receive_message_bytes: Annotated[
        int, Field(ge=16_384, le=64 * 1024 * 1024, description="bytes of a request message")
    ] = 1024 * 1024
    chunk_bytes: Annotated[
        int, Field(ge=1024, le=2 * 1024 * 1024, description="image bytes in one message")
    ] = 128 * 1024

    retention_seconds: Annotated[
        Seconds, Field(description="how long a job that has ended is kept, with its images")
    ] = 3600
    max_retained_jobs: Annotated[PositiveInt, Field(description="jobs that have ended, kept at most")] = 1000
    max_retained_bytes: Annotated[
        PositiveInt | None,
        Field(description="images of jobs that have ended, kept at most; any number of bytes when absent"),
    ] = None
    retention_dry_run: Annotated[
        bool, Field(description="log which jobs would be removed (true or false), and keep them")
    ] = False
    orphan_sweep_seconds: Annotated[
        float,
        Field(
            ge=1, le=86_400, description="between two looks for files that no job names, which are removed"
        ),
    ] = 600.0
    grace_seconds: Annotated[Seconds, Field(description="time for accepted jobs to end on SIGTERM")] = 60
    drain_delay_seconds: Annotated[
        Seconds, Field(description="time to take new calls after health says NOT_SERVING on SIGTERM")
    ] = 0

    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], Field(description="least severe level that is logged")
    ] = "INFO"
    log_format: Annotated[Literal["text", "json"], Field(description="lines or JSON objects")] = "text"
    log_file: Annotated[PathSetting | None, Field(description="also append the log to this file")] = None

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_blank(cls, value: Any) -> Any:
        return _not_blank(value)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the file that `load_settings` was given."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(flags: Mapping[str, Any], config: str | None) -> Settings:
    """Put the settings together.

    Args:
        flags: what was given on the command line, by field name.
        config: path of a TOML file with fields of `Settings`.

    Raises:
        ConfigurationError: a value is empty or out of its range, or the file cannot be read.
    """
    # Also where a flag goes before it: one rule, whatever reads the variable.
    of_settings = set(map(variable_name, Settings.model_fields))
    _refuse_empty_variables(name for name in os.environ if name.upper() in of_settings)
    config_file = None if config is None else _config_file(config)

    class _Settings(Settings):
        model_config = SettingsConfigDict(toml_file=config_file and config_file.absolute())

    try:
        settings = _Settings(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigurationError(_origin(name, flags, config_file), reason) from None
    except (SettingsError, ValueError, OSError) as error:
        raise ConfigurationError(str(config_file or ENVIRONMENT_PREFIX), str(error)) from None
    if (settings.artifacts or "").startswith("s3:"):
        # What opens the bucket would take an empty endpoint or key for one.
        _refuse_empty_variables(name for name in os.environ if name.startswith("AWS_"))
    return settings


def flag_name(field: str) -> str:
    """The command-line flag of a field."""
    return "--" + field.replace("_", "-")


def variable_name(field: str) -> str:
    """The environment variable of a field."""
    return ENVIRONMENT_PREFIX + field.upper()


def describe_unknown_variables(names: Iterable[str]) -> str | None:
    """Name the variables that look like settings and are none, each with the setting that may be meant.

    A warning, where a flag or a key of the file that does not exist is refused: Kubernetes and operators
    give variables of this prefix too (`HIDREAM_PORT`, say, for a Service called hidream).

    Returns:
        One line, or None when there are none.
    """
    known = {variable_name(field) for field in Settings.model_fields}
    unknown = {
        name
        for name in names
        if (upper := name.upper()).startswith(ENVIRONMENT_PREFIX)
        and upper not in known | VARIABLES_OF_CLIENTS
    }
    if not unknown:
        return None
    guesses = {name: get_close_matches(name.upper(), sorted(known), n=1, cutoff=0.9) for name in unknown}
    listed = ", ".join(
        f"{name} (did you mean {guesses[name][0]}?)" if guesses[name] else name for name in sorted(unknown)
    )
    return f"no settings, and ignored: {listed}"


def _refuse_empty_variables(names: Iterable[str]) -> None:
    for name in names:
        try:
            _not_blank(os.environ[name])
        except ValueError as error:
            raise ConfigurationError(name, str(error)) from None


def _config_file(text: str) -> Path:
    try:
        config_file = Path(_path_text(_not_blank(text)))
    except ValueError as error:
        raise ConfigurationError("--config", str(error)) from None
    if not config_file.is_file():
        raise ConfigurationError("--config", f"{config_file}: no such file")
    return config_file


def _origin(field: str, flags: Mapping[str, Any], config_file: Path | None) -> str:
    """What the operator wrote: a flag goes before a variable, a variable before a key of the file."""
    if field in flags:
        return flag_name(field)
    is_variable = variable_name(field) in map(str.upper, os.environ)
    if field in Settings.model_fields and (is_variable or config_file is None):
        return variable_name(field)
    return f"{field} ({config_file})"
