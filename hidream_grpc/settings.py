"""Everything that an operator can set: flag > environment (`HIDREAM_…`) > file > default.

Only `cli.py` and the server see these settings: the layers below take the small frozen values that
`server/configuration.py` makes of them.
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
from hidream_grpc.model.checkpoint.prompt_lengths import MAX_PROMPT_TOKENS, TRAINED_PROMPT_TOKENS
from hidream_grpc.model.image_metadata import MetadataDetail
from hidream_grpc.settings_help import INT64_MAX, Group, Help

ENVIRONMENT_PREFIX = "HIDREAM_"
VARIABLES_OF_CLIENTS = frozenset(
    f"HIDREAM_{name}" for name in ("ADDRESS", "CA_FILE", "CERT_FILE", "KEY_FILE", "TLS", "TOKEN")
)

BRIDGE_PREFIX = "HIDREAM_HTTP_"
"""The beginning of the variables of the HTTP bridge, which may run in the same environment."""

_TIMEOUTS = GroupTimeouts()

PositiveInt = Annotated[int, Field(ge=1)]
WeightFormatName = Literal["bfloat16", "int8", "float8"]
Seconds = Annotated[float, Field(ge=0, le=86_400)]


def _not_blank(value: Any) -> Any:
    """Refuse an empty text: a setting that shall have its default is left out.

    Otherwise a manifest's `${UNSET}` would silently give each replica a store of its own.
    """
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty; leave it out to have its default")
    return value


def _path_text(value: Any) -> Any:
    """Refuse a text that is no path, and a `~` that no shell has expanded; take every other name as it is."""
    if not isinstance(value, str):
        return value
    if value.startswith("~"):
        raise ValueError(f"{value!r}: only a shell expands ~; write the whole path, or ./~ for such a name")
    if "\0" in value:
        raise ValueError(f"{value!r} is no path")
    return value


def _in_capitals(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


PathSetting = Annotated[Path, BeforeValidator(_path_text)]
"""The path of a file or folder, relative to the working folder of the server, wherever it is set."""


class Settings(BaseSettings):
    """The settings of one server; every field is also a flag of `hidream-grpc serve`."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, frozen=True, extra="forbid")

    model_path: Annotated[
        PathSetting | None,
        Help(Group.MODEL, "folder of HiDream-I1, in diffusers format", "the built-in demo model"),
    ] = None
    extra_model_path: Annotated[
        PathSetting | None,
        Help(Group.MODEL, "folder of Llama-3.1-8B-Instruct", "text_encoder_4 of the model folder"),
    ] = None
    weights: Annotated[
        WeightFormatName,
        Help(
            Group.MODEL,
            "how the matrices of the transformer are held: int8 and float8 take half the memory, and images "
            "differ a little; float8 not on npu",
        ),
    ] = "bfloat16"
    text_encoder_weights: Annotated[
        WeightFormatName,
        Help(
            Group.MODEL, "the same of text encoders on devices; on the host of an accelerator they are exact"
        ),
    ] = "bfloat16"

    device_type: Annotated[
        str, Help(Group.DEVICES, "auto, npu, cuda or cpu; auto takes the first of these that is present")
    ] = "auto"
    devices: Annotated[
        str | None,
        Help(
            Group.DEVICES,
            "one rank each: 0,1,2,3 or 0-3; on a CPU any numbers, one a rank",
            "the first ones, as many as the layout has ranks",
        ),
    ] = None
    layout: Annotated[
        str | None,
        Help(
            Group.DEVICES,
            "how the ranks share the work: tp=4,ep=2 or cfg=2,sp=4; table, as the replaced server did; auto, "
            "the fastest for one image; throughput, most images a second",
            "table; without --devices cfg=2 on cpu, tp=1 on npu and cuda",
        ),
    ] = None
    threads_per_rank: Annotated[
        int | None, Help(Group.DEVICES, "CPU threads of each rank", "cores ÷ ranks"), Field(ge=1, le=1024)
    ] = None
    compile_shapes: Annotated[
        str | None,
        Help(
            Group.DEVICES,
            "steps to compile at the start, width x height x samples, and x tokens of long prompts: "
            "1024x1024x2,768x1360x2x256",
            "none are compiled",
        ),
    ] = None
    replace: Annotated[
        Literal["one", "all"] | None,
        Help(
            Group.DEVICES,
            "which ranks are started again when one dies",
            "all on npu and cuda, one on cpu",
        ),
    ] = None
    load_timeout_seconds: Annotated[
        Seconds, Help(Group.DEVICES, "time that a rank may take to load and compile the model")
    ] = _TIMEOUTS.load_seconds
    collective_timeout_seconds: Annotated[
        Seconds, Help(Group.DEVICES, "time that the ranks may take to exchange the results of a step")
    ] = _TIMEOUTS.collective_seconds

    listen: Annotated[str, Help(Group.LISTENING, "HOST:PORT to serve gRPC on; port 0 takes a free one")] = (
        "0.0.0.0:8088"
    )
    metrics_port: Annotated[
        int | None,
        Help(Group.LISTENING, "port of the metrics for Prometheus; 0 takes a free one", "no metrics"),
        Field(ge=0, le=65_535),
    ] = None
    tls_certificate: Annotated[
        PathSetting | None,
        Help(
            Group.LISTENING,
            "PEM file of the server's certificate and those up to its authority; read again when it changes",
            "no encryption",
        ),
    ] = None
    tls_key: Annotated[
        PathSetting | None,
        Help(Group.LISTENING, "PEM file of the private key of --tls-certificate", "no encryption"),
    ] = None
    tls_client_ca: Annotated[
        PathSetting | None,
        Help(
            Group.LISTENING,
            "PEM file of the authorities of callers, each of which then needs a certificate that names it",
            "callers need no certificate",
        ),
    ] = None
    drain_delay_seconds: Annotated[
        Seconds,
        Help(Group.LISTENING, "time after SIGTERM in which health says NOT_SERVING and calls are accepted"),
    ] = 0
    grace_seconds: Annotated[
        Seconds, Help(Group.LISTENING, "time after --drain-delay-seconds in which running jobs may end")
    ] = 60

    data_dir: Annotated[
        PathSetting | None,
        Help(
            Group.JOBS,
            "folder of the jobs and images; one server uses it at a time",
            "$XDG_DATA_HOME/hidream-grpc, else ~/.local/share/hidream-grpc",
        ),
    ] = None
    store: Annotated[
        str | None,
        Help(
            Group.JOBS,
            "database that replicas share: postgresql://USER:PASSWORD@HOST/DATABASE",
            "SQLite in --data-dir",
        ),
    ] = None
    store_outage_seconds: Annotated[
        float,
        Help(Group.JOBS, "how long the store may refuse what a job needs before health says NOT_SERVING"),
        Field(ge=0.1, le=3600),
    ] = 10.0
    lease_seconds: Annotated[
        float,
        Help(Group.JOBS, "with PostgreSQL, silence of a replica after which another takes its jobs"),
        Field(ge=1, le=3600),
    ] = 15.0
    retention_seconds: Annotated[
        float,
        Help(Group.JOBS, "how long a job that has ended is kept, with its images"),
        Field(ge=0, allow_inf_nan=False),
    ] = 3600
    max_retained_jobs: Annotated[
        PositiveInt, Help(Group.JOBS, "jobs that have ended and are kept; beyond it the oldest are removed")
    ] = 1000
    retention_dry_run: Annotated[bool, Help(Group.JOBS, "log which jobs would be removed, and keep them")] = (
        False
    )

    artifacts: Annotated[
        str | None,
        Help(
            Group.IMAGES,
            "where images are stored: s3://BUCKET/PREFIX or file:///FOLDER",
            "a folder in --data-dir",
        ),
    ] = None
    max_retained_bytes: Annotated[
        int | None,
        Help(
            Group.IMAGES,
            "bytes of the images of jobs that have ended; beyond it the oldest are removed",
            "any number",
        ),
        Field(ge=1),
    ] = None
    orphan_sweep_seconds: Annotated[
        float,
        Help(Group.IMAGES, "interval at which files that belong to no job are removed"),
        Field(ge=1, le=86_400),
    ] = 600.0

    image_metadata: Annotated[
        MetadataDetail,
        Help(
            Group.IMAGES,
            "what an image file says of itself: nothing, that a model generated it, or also prompt, seed and "
            "all else that generates it again",
        ),
    ] = "full"
    c2pa_certificate: Annotated[
        PathSetting | None,
        Help(
            Group.IMAGES,
            "PEM file of the certificate that signs a C2PA manifest in each image, and of those up to its "
            "authority; needs the extra c2pa",
            "no manifest",
        ),
    ] = None
    c2pa_key: Annotated[
        PathSetting | None,
        Help(Group.IMAGES, "PEM file of the private key of --c2pa-certificate", "no manifest"),
    ] = None

    max_queued_jobs: Annotated[int, Help(Group.LIMITS, "jobs that may wait"), Field(ge=1, le=1_000_000)] = 64
    max_running_jobs: Annotated[
        int,
        Help(Group.LIMITS, "jobs of a priority or a higher one that may run at the same time"),
        Field(ge=1, le=1024),
    ] = 16
    max_step_pixels: Annotated[
        int,
        Help(Group.LIMITS, "most width × height × samples of one forward; how much of it pays is learnt"),
        Field(ge=4096),
    ] = 8 * 1024 * 1024
    max_streams: Annotated[
        int, Help(Group.LIMITS, "streams that may be open at the same time"), Field(ge=1, le=100_000)
    ] = 1000
    max_num_images: Annotated[int, Help(Group.LIMITS, "images of one request"), Field(ge=1, le=64)] = 8
    max_num_inference_steps: Annotated[
        int, Help(Group.LIMITS, "steps of one request"), Field(ge=1, le=1000)
    ] = 150
    max_guidance_scale: Annotated[
        float, Help(Group.LIMITS, "guidance scale of one request"), Field(gt=0, le=100)
    ] = 20.0
    max_prompt_tokens: Annotated[
        int,
        Help(
            Group.LIMITS,
            "tokens of a prompt for each text encoder, as far as it takes so many; the model was trained "
            f"with {TRAINED_PROMPT_TOKENS}, and longer prompts cost a little more time",
        ),
        Field(ge=TRAINED_PROMPT_TOKENS, le=MAX_PROMPT_TOKENS),
    ] = TRAINED_PROMPT_TOKENS
    max_prompt_bytes: Annotated[int, Help(Group.LIMITS, "bytes of a prompt"), Field(ge=16, le=65_536)] = 4096
    max_receive_message_bytes: Annotated[
        int, Help(Group.LIMITS, "bytes of a request message"), Field(ge=16_384, le=64 * 1024 * 1024)
    ] = 1024 * 1024
    chunk_bytes: Annotated[
        int, Help(Group.LIMITS, "image bytes in one message"), Field(ge=1024, le=2 * 1024 * 1024)
    ] = 128 * 1024

    tokens_file: Annotated[
        PathSetting | None,
        Help(
            Group.CALLERS,
            "file with the name and the bearer token of a caller in each line",
            "anybody may call",
        ),
    ] = None
    trusted_proxies: Annotated[
        str | None,
        Help(
            Group.CALLERS,
            "peers whose x-forwarded-for names the caller where neither a token nor a certificate does: "
            "10.0.0.0/8,::1; unix is any Unix socket",
            "every peer is a caller",
        ),
    ] = None
    trusted_bridges: Annotated[
        str | None,
        Help(
            Group.CALLERS,
            "HTTP bridges that are believed whose certificate they saw, where no token names the caller: "
            "127.0.0.1,::1; unix is any Unix socket",
            "no bridge names a caller",
        ),
    ] = None
    max_queued_jobs_per_caller: Annotated[
        int | None,
        Help(Group.CALLERS, "jobs of one caller that may wait", "as --max-queued-jobs"),
        Field(ge=1, le=1_000_000),
    ] = None
    max_running_jobs_per_caller: Annotated[
        int | None,
        Help(Group.CALLERS, "jobs of one caller that may run at the same time", "as --max-running-jobs"),
        Field(ge=1, le=1024),
    ] = None
    max_pixel_steps_per_minute_per_caller: Annotated[
        int | None,
        Help(
            Group.CALLERS,
            "width × height × steps × images that one caller may ask for within a minute",
            "any number",
        ),
        Field(ge=1, le=INT64_MAX),
    ] = None
    max_streams_per_caller: Annotated[
        int,
        Help(Group.CALLERS, "streams of one caller that may be open at the same time"),
        Field(ge=1, le=100_000),
    ] = 200

    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        Help(Group.LOGGING, "least severe level that is logged"),
        BeforeValidator(_in_capitals),
    ] = "INFO"
    log_format: Annotated[
        Literal["text", "json"], Help(Group.LOGGING, "lines of text, or a JSON object a line")
    ] = "text"
    log_file: Annotated[
        PathSetting | None, Help(Group.LOGGING, "file to append the log to, beside stderr", "stderr alone")
    ] = None

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
        and not upper.startswith(BRIDGE_PREFIX)
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
