"""Every setting, read once from ``IMG2IMG_*`` variables. Times are seconds, sizes bytes, sides pixels."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from img2img.errors import ConfigurationError
from img2img.images import PictureLimits
from img2img.requests import RequestLimits

PREFIX: Final = "IMG2IMG_"
LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
BUNDLED_MODEL: Final = "emoji-sd"
MAX_PORT: Final = 65535
NO_PORT: Final = -1
GUIDED_ROWS: Final = 2
POSITIVE: Final = (
    "attempt_timeout", "attempts", "beat", "crash_limit", "idempotency_retention", "job_retention", "lease",
    "max_image_bytes", "max_image_side", "max_job_age", "max_json_body", "max_prompt_bytes", "phase_limit",
    "result_retention", "scaler_target_seconds", "stall_limit", "sync_timeout", "upstream_account_calls",
    "upstream_breaker", "upstream_max_calls", "upstream_min_concurrency", "upstream_token_calls",
)  # fmt: skip
NOT_NEGATIVE: Final = (
    "checkpoint_interval", "concurrency", "drain_timeout", "fake_step_seconds", "input_retention", "max_defer",
    "max_queued", "max_queued_per_tenant", "max_rows", "max_wait", "preview_interval", "priority_seconds",
    "progress_interval", "reproducible_rows", "retry_delay", "retry_grace",
)  # fmt: skip
MAX_SECONDS: Final = 100 * 365 * 24 * 3600.0
"""No time may be longer; clocks and timers go no further than some centuries."""
CHOICES: Final = {
    "engine": ("auto", "diffusion", "cloudflare", "fake"),
    "upstream_images": ("base64", "integers"),
    "upstream_on_lost": ("retry", "fail"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "log_level": ("debug", "info", "warning", "error"),
    "log_format": ("auto", "json", "console"),
}
CLIENT_VARIABLES: Final = frozenset({"IMG2IMG_SERVER", "IMG2IMG_KEY"})
"""Read by the client's commands, not by the service."""
UPSTREAM_URL: Final = re.compile(r"https?://[^\s/?#@]+(/[^\s?#@]*)?")
WORDS: Final = {int: "an integer", float: "a number", bool: "true or false"}
"""The types that not every text can be read as."""
SERVICE_LINK: Final = re.compile(r"_SERVICE_(HOST|PORT)(_\w+)?$|_PORT(_\d+_(TCP|UDP)\w*)?$")
"""What Kubernetes puts into every container for a service whose name begins with img2img."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Frozen settings; field ``http_port`` is variable ``IMG2IMG_HTTP_PORT``."""

    # Where things are
    redis_url: str = "redis://127.0.0.1:6379/0"
    blobs: str = "redis"
    queue: str = "default"
    pools_file: Path | None = None

    # Front ends
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 50051
    tenants_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    sync_timeout: float = 55.0
    retry_grace: float = 15.0
    max_wait: float = 60.0
    drain_timeout: float = 30.0
    reproducible: bool = False
    scaler_port: int = -1
    scaler_tls_cert: Path | None = None
    scaler_tls_key: Path | None = None
    scaler_client_ca: Path | None = None
    scaler_target_seconds: float = 30.0

    # Limits
    max_json_body: int = 64 * 1024 * 1024
    max_image_bytes: int = 16 * 1024 * 1024
    max_image_side: int = 4096
    max_grpc_message: int = 20 * 1024 * 1024
    max_body_bytes_in_flight: int = 256 * 1024 * 1024
    max_prompt_bytes: int = 16 * 1024
    max_job_age: float = 24 * 3600.0
    max_defer: float = 30 * 24 * 3600.0
    max_queued: int = 20_000
    max_queued_per_tenant: int = 10_000
    refuse_late: bool = True

    # Retention
    input_retention: float = 0.0
    result_retention: float = 24 * 3600.0
    job_retention: float = 7 * 24 * 3600.0
    idempotency_retention: float = 24 * 3600.0

    # Worker
    engine: str = "auto"
    model: str = BUNDLED_MODEL
    device: str = "auto"
    concurrency: int = 0
    max_rows: int = 0
    reproducible_rows: int = 0
    precision: str = "auto"
    compile: bool = False
    image_metadata: bool = True
    safety_checker: str | None = None
    fake_step_seconds: float = 0.0
    fake_obeys: bool = True
    upstream_url: str = "https://api.cloudflare.com/client/v4"
    upstream_account: str | None = None
    upstream_token: str | None = None
    upstream_accounts_file: Path | None = None
    upstream_images: str = "base64"
    upstream_on_lost: str = "retry"
    upstream_max_calls: int = 4
    upstream_account_calls: int = 1500
    upstream_token_calls: int = 1200
    upstream_min_concurrency: int = 1
    upstream_max_concurrency: int = 64
    upstream_breaker: int = 5
    lease: float = 6.0
    beat: float = 2.0
    stall_limit: float = 60.0
    phase_limit: float = 600.0
    attempts: int = 3
    crash_limit: int = 2
    attempt_timeout: float = 600.0
    retry_delay: float = 1.0
    priority_seconds: float = 30.0
    progress_interval: float = 0.1
    preview_interval: float = 1.0
    checkpoint_interval: float = 5.0

    # Watching
    log_level: str = "info"
    log_format: str = "auto"
    log_prompts: bool = False
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9464

    def __repr__(self) -> str:
        # The address of the server may hold its password.
        shown = msgspec.structs.asdict(self) | {"redis_url": "***", "upstream_token": self.upstream_token and "***"}
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def request_limits(self) -> RequestLimits:
        return RequestLimits(
            prompt_bytes=self.max_prompt_bytes,
            pictures=PictureLimits(file_bytes=self.max_image_bytes, side=self.max_image_side),
            max_deadline=self.max_job_age,
            max_defer=self.max_defer,
        )

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ, **overrides: Any) -> "Settings":
        """Read the variables, of which an empty one counts as unset; ``overrides`` that are not None win.

        Raises:
            ConfigurationError: an unknown variable or a value of the wrong form, named with its remedy.
        """
        known = {field.name for field in msgspec.structs.fields(cls)}
        given: dict[str, Any] = {}
        for variable, value in environment.items():
            if not variable.startswith(PREFIX):
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name not in known and (variable in CLIENT_VARIABLES or SERVICE_LINK.search(variable)):
                continue
            if name not in known:
                raise ConfigurationError(f"{variable} is not a setting: see docs/settings.md, or unset it")
            if value:
                given[name] = value
        given |= {name: value for name, value in overrides.items() if value is not None}
        try:
            settings = msgspec.convert(given, cls, strict=False, dec_hook=_decode)
        except msgspec.ValidationError as exc:
            name = str(exc).partition(" - at `$.")[2].rstrip("`")
            kind = next(field.type for field in msgspec.structs.fields(cls) if field.name == name)
            raise ConfigurationError(f"{PREFIX}{name.upper()} must be {WORDS[kind]}, not {given[name]!r}") from exc
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse values that mean nothing, or contradict each other.

        Raises:
            ConfigurationError: says which and how to mend it.
        """
        self._check_numbers()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                given = getattr(self, name)
                raise ConfigurationError(
                    f"{PREFIX}{name.upper()} must be {', '.join(choices[:-1])} or {choices[-1]}, not {given!r}"
                )
        for name in ("max_rows", "reproducible_rows"):
            if getattr(self, name) != 0 and getattr(self, name) < GUIDED_ROWS:
                raise ConfigurationError(f"{PREFIX}{name.upper()} must be 0, or at least 2: a guided job has two rows")
        if self.lease < 2 * self.beat:
            raise ConfigurationError("IMG2IMG_LEASE must be at least twice IMG2IMG_BEAT")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigurationError("IMG2IMG_TLS_CERT and IMG2IMG_TLS_KEY go together: set both or none")
        if self.job_retention < self.result_retention:
            raise ConfigurationError("IMG2IMG_JOB_RETENTION must be at least IMG2IMG_RESULT_RETENTION")
        if self.max_body_bytes_in_flight < 2 * self.max_json_body:
            raise ConfigurationError(
                "IMG2IMG_MAX_BODY_BYTES_IN_FLIGHT must be at least twice IMG2IMG_MAX_JSON_BODY: a body counts twice, "
                "as it comes in and decoded"
            )

        self._check_scaler()
        self._check_upstream()

    def _check_scaler(self) -> None:
        if not -1 <= self.scaler_port <= MAX_PORT:
            raise ConfigurationError(
                f"IMG2IMG_SCALER_PORT must be a port, 0 to {MAX_PORT} (0: any free one), or -1 for none"
            )
        if len({path is None for path in (self.scaler_tls_cert, self.scaler_tls_key, self.scaler_client_ca)}) > 1:
            raise ConfigurationError(
                "IMG2IMG_SCALER_TLS_CERT, IMG2IMG_SCALER_TLS_KEY and IMG2IMG_SCALER_CLIENT_CA go together: "
                "set all or none"
            )
        if self.scaler_port >= 0 and self.scaler_client_ca is None and not self.is_loopback:
            raise ConfigurationError(
                f"Without certificates the scaler listens on loopback only, not on {self.host}: set "
                "IMG2IMG_SCALER_TLS_CERT, IMG2IMG_SCALER_TLS_KEY and IMG2IMG_SCALER_CLIENT_CA, "
                "or IMG2IMG_SCALER_PORT=-1"
            )

    def _check_upstream(self) -> None:
        if not UPSTREAM_URL.fullmatch(self.upstream_url):
            raise ConfigurationError(
                "IMG2IMG_UPSTREAM_URL must be an address such as https://api.cloudflare.com/client/v4, without user, "
                "query or fragment"
            )
        if self.upstream_max_concurrency < self.upstream_min_concurrency:
            raise ConfigurationError(
                "IMG2IMG_UPSTREAM_MAX_CONCURRENCY must be at least IMG2IMG_UPSTREAM_MIN_CONCURRENCY"
            )

    def _check_numbers(self) -> None:
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{PREFIX}{name.upper()} must be above 0")
        for name in NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"{PREFIX}{name.upper()} must be 0 or above")
        for field in msgspec.structs.fields(self):
            if field.type is float and getattr(self, field.name) > MAX_SECONDS:
                raise ConfigurationError(f"{PREFIX}{field.name.upper()} must be at most {MAX_SECONDS:.0f} (100 years)")
        for name in ("http_port", "grpc_port"):
            if not 0 <= getattr(self, name) <= MAX_PORT:
                raise ConfigurationError(f"{PREFIX}{name.upper()} must be a port, 0 to {MAX_PORT} (0: any free one)")
        if not NO_PORT <= self.metrics_port <= MAX_PORT:
            raise ConfigurationError(
                f"IMG2IMG_METRICS_PORT must be a port, 0 to {MAX_PORT} (0: any free one), or {NO_PORT} for none"
            )


def _decode(kind: type, value: object) -> object:
    if kind is Path:
        return Path(str(value))
    raise TypeError(kind)
