"""Settings come from ``IMG2IMG_*`` variables, and a wrong one is told with its name and remedy."""

from pathlib import Path

import msgspec
import pytest

from img2img.errors import ConfigurationError
from img2img.settings import PREFIX, Settings

FIELDS = msgspec.structs.fields(Settings)


def read(**variables: str) -> Settings:
    return Settings.from_environment({f"{PREFIX}{name.upper()}": value for name, value in variables.items()})


class TestReading:
    def test_an_empty_environment_gives_the_defaults(self) -> None:
        assert Settings.from_environment({}) == Settings()

    @pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
    def test_every_setting_has_a_default_that_its_variable_can_say(self, field: msgspec.structs.FieldInfo) -> None:
        if field.default is None:
            return
        assert getattr(read(**{field.name: str(field.default).lower()}), field.name) == field.default

    @pytest.mark.parametrize(
        ("name", "text", "value"),
        [
            ("http_port", "80", 80),
            ("sync_timeout", "1.5", 1.5),
            ("max_wait", "20", 20.0),
            ("blobs", "s3://bucket/prefix?region=eu-west-1", "s3://bucket/prefix?region=eu-west-1"),
            ("tenants_file", "/etc/img2img/tenants.toml", Path("/etc/img2img/tenants.toml")),
            ("log_prompts", "true", True),
            ("log_prompts", "0", False),
        ],
    )
    def test_a_variable_is_read_as_its_settings_type(self, name: str, text: str, value: object) -> None:
        got = getattr(read(**{name: text}), name)
        assert got == value
        assert isinstance(got, type(value))

    def test_other_variables_are_none_of_our_business(self) -> None:
        assert Settings.from_environment({"PATH": "/bin", "img2img_http_port": "1", "XIMG2IMG_A": "1"}) == Settings()

    def test_arguments_win_over_variables_unless_they_are_none(self) -> None:
        environment = {"IMG2IMG_HTTP_PORT": "80", "IMG2IMG_GRPC_PORT": "81"}
        settings = Settings.from_environment(environment, http_port=90, grpc_port=None)
        assert (settings.http_port, settings.grpc_port) == (90, 81)

    def test_nothing_changes_afterwards(self) -> None:
        with pytest.raises(AttributeError):
            Settings().http_port = 1  # type: ignore[misc]


class TestRefusals:
    @pytest.mark.parametrize(
        ("variables", "expected"),
        [
            ({"http_prot": "80"}, "IMG2IMG_HTTP_PROT is not a setting: see docs/settings.md, or unset it"),
            ({"http_port": "eighty"}, "IMG2IMG_HTTP_PORT must be an integer, not 'eighty'"),
            ({"http_port": "8.5"}, "IMG2IMG_HTTP_PORT must be an integer, not '8.5'"),
            ({"lease": "long"}, "IMG2IMG_LEASE must be a number, not 'long'"),
            ({"log_prompts": "maybe"}, "IMG2IMG_LOG_PROMPTS must be true or false, not 'maybe'"),
            ({"lease": "3", "beat": "2"}, "IMG2IMG_LEASE must be at least twice IMG2IMG_BEAT"),
            ({"tls_cert": "cert.pem"}, "IMG2IMG_TLS_CERT and IMG2IMG_TLS_KEY go together: set both or none"),
            ({"tls_key": "key.pem"}, "IMG2IMG_TLS_CERT and IMG2IMG_TLS_KEY go together: set both or none"),
            ({"job_retention": "60"}, "IMG2IMG_JOB_RETENTION must be at least IMG2IMG_RESULT_RETENTION"),
            ({"engine": "magic"}, "IMG2IMG_ENGINE must be auto, diffusion, cloudflare or fake, not 'magic'"),
            ({"log_level": "verbose"}, "IMG2IMG_LOG_LEVEL must be debug, info, warning or error, not 'verbose'"),
            ({"log_format": "xml"}, "IMG2IMG_LOG_FORMAT must be auto, json or console, not 'xml'"),
            ({"upstream_images": "raw"}, "IMG2IMG_UPSTREAM_IMAGES must be base64 or integers, not 'raw'"),
            ({"upstream_on_lost": "hope"}, "IMG2IMG_UPSTREAM_ON_LOST must be retry or fail, not 'hope'"),
            ({"upstream_url": "api.cloudflare.com"}, "IMG2IMG_UPSTREAM_URL must be an address such as"),
            ({"upstream_url": "https://user@host/client"}, "IMG2IMG_UPSTREAM_URL must be an address such as"),
            (
                {"upstream_min_concurrency": "9", "upstream_max_concurrency": "8"},
                "IMG2IMG_UPSTREAM_MAX_CONCURRENCY must be at least IMG2IMG_UPSTREAM_MIN_CONCURRENCY",
            ),
            ({"scaler_port": "-2"}, "IMG2IMG_SCALER_PORT must be a port, 0 to 65535 (0: any free one), or -1 for none"),
            ({"scaler_client_ca": "ca.pem"}, "IMG2IMG_SCALER_TLS_CERT, IMG2IMG_SCALER_TLS_KEY and"),
            (
                {"host": "0.0.0.0", "scaler_port": "0"},
                "Without certificates the scaler listens on loopback only, not on 0.0.0.0: set IMG2IMG_SCALER_TLS_CERT",
            ),
            ({"scaler_target_seconds": "0"}, "IMG2IMG_SCALER_TARGET_SECONDS must be above 0"),
            ({"drain_timeout": "inf"}, "IMG2IMG_DRAIN_TIMEOUT must be at most 3153600000 (100 years)"),
            ({"drain_timeout": "-1"}, "IMG2IMG_DRAIN_TIMEOUT must be 0 or above"),
            ({"metrics_port": "-2"}, "IMG2IMG_METRICS_PORT must be a port, 0 to 65535 (0: any free one), or -1"),
            ({"retry_grace": "-20"}, "IMG2IMG_RETRY_GRACE must be 0 or above"),
            ({"max_wait": "nan"}, "IMG2IMG_MAX_WAIT must be 0 or above"),
            ({"result_retention": "1e300", "job_retention": "1e300"}, "IMG2IMG_RESULT_RETENTION must be at most"),
        ],
    )
    def test_a_wrong_setting_is_named_with_its_remedy(self, variables: dict[str, str], expected: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            read(**variables)
        assert str(caught.value).startswith(expected)

    def test_arguments_are_checked_like_variables(self) -> None:
        with pytest.raises(ConfigurationError, match="IMG2IMG_HTTP_PORT"):
            Settings.from_environment({}, http_port="eighty")


class TestDerived:
    def test_secrets_are_never_shown(self) -> None:
        settings = read(upstream_token="s3cr3t", upstream_account="acme", redis_url="redis://:s3cr3t@queue:6379/0")
        assert "s3cr3t" not in repr(settings)
        assert "upstream_account='acme'" in repr(settings)

    @pytest.mark.parametrize(
        ("host", "expected"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
    )
    def test_loopback_is_known(self, host: str, expected: bool) -> None:
        assert read(host=host).is_loopback is expected

    def test_the_limits_of_a_request_come_from_the_settings(self) -> None:
        limits = read(max_prompt_bytes="1", max_image_bytes="2", max_image_side="3", max_job_age="4").request_limits
        assert limits.prompt_bytes == 1
        assert (limits.pictures.file_bytes, limits.pictures.side) == (2, 3)
        assert limits.max_deadline == 4.0

    def test_one_body_of_the_largest_size_fits_into_the_budget(self) -> None:
        """It counts twice: as it came and decoded."""
        assert Settings().max_body_bytes_in_flight >= 2 * Settings().max_json_body
