"""What the chart's processes read: their variables are settings, and the pools file is one."""

from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from gateway.main import load_tenants
from gateway.routing import open_router
from img2img.pools import Pool, Pools, RequestClass
from img2img.settings import PREFIX, Settings
from tests.helm.rendering import CASES, MINIMAL, Refused, Rendered, environment, render
from worker.pool import settings_of_worker

Releases = dict[tuple[str, str], Rendered]
SECRETS: Final = {"IMG2IMG_REDIS_URL": "redis://:password@queue:6379/0"}
OTHERS: Final = frozenset(
    (
        "AUTHORIZATION", "HF_HUB_OFFLINE", "HF_TOKEN", "HTTPS_PROXY", "IMG2IMG_KEY", "IMG2IMG_SERVER",
        "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER",
        "OTEL_TRACES_SAMPLER_ARG", "POD_NAME",
    )
)  # fmt: skip
"""Variables that are no settings of the service."""


def own_variables(container: dict[str, Any]) -> dict[str, str]:
    """The settings among a container's variables; what a secret holds is made up."""
    given = {name: value for name, value in environment(container).items() if name not in OTHERS}
    return {name: value if isinstance(value, str) else SECRETS[name] for name, value in given.items()}


def processes(rendered: Rendered) -> list[tuple[str, dict[str, str]]]:
    """Name and settings of every gateway and worker."""
    return [
        (name, own_variables(container))
        for name, container in rendered.containers()
        if name.endswith(("/gateway", "/worker"))
    ]


def pools_file(rendered: Rendered, folder: Path) -> Path:
    [text] = [
        item["data"]["pools.toml"] for item in rendered.of("ConfigMap") if item["metadata"]["name"].endswith("-pools")
    ]
    path = folder / "pools.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("case", CASES)
def test_every_variable_is_a_setting(releases: Releases, case: str) -> None:
    """A misspelt one would keep the process from starting."""
    known = {f"{PREFIX}{field.name.upper()}" for field in msgspec.structs.fields(Settings)}
    found = processes(releases["helm4", case])
    assert len(found) >= 2
    assert [(name, sorted(set(given) - known)) for name, given in found if set(given) - known] == []


@pytest.mark.parametrize("case", CASES)
def test_every_process_takes_its_settings(releases: Releases, case: str, tmp_path: Path) -> None:
    """Values, forms and combinations; workers with the engine and model of their pool, gateways with their routes."""
    rendered = releases["helm4", case]
    path = pools_file(rendered, tmp_path)
    for name, given in processes(rendered):
        settings = Settings.from_environment(given | {"IMG2IMG_POOLS_FILE": str(path)})
        if name.endswith("/gateway"):
            assert open_router(settings) is not None
            assert settings.tenants_file == Path("/etc/img2img/tenants/tenants.toml")
        else:
            pool = Pools.load(path).by_name[settings.queue]
            assert settings_of_worker(settings).engine == pool.engine
            assert not settings.metrics_host.startswith("127.")


def test_the_chart_reckons_with_the_defaults_of_the_settings() -> None:
    """Grace period and start-up time follow from settings, also from those that nobody has set."""
    rendered, default = render("helm4", MINIMAL), Settings()
    spec = rendered.named("Deployment", "pictures-img2img-worker-cpu")["spec"]["template"]["spec"]
    [container] = spec["containers"]
    drain = float(environment(container)["IMG2IMG_DRAIN_TIMEOUT"])
    assert spec["terminationGracePeriodSeconds"] == drain + default.lease + 10
    probe = container["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] == 3 * default.phase_limit + 60
    assert render("helm4", MINIMAL | {"settings": {"lease": 2 * default.beat}})
    with pytest.raises(Refused, match="must be at least twice beat"):
        render("helm4", MINIMAL | {"settings": {"lease": 1.9 * default.beat}})


def test_traces_say_where_a_process_is_and_leave_the_rest_to_it(releases: Releases) -> None:
    """Its version is that of its image, whatever the chart's is."""
    for name, container in releases["helm4", "everything"].containers():
        if name.endswith(("/gateway", "/worker")):
            said = environment(container)["OTEL_RESOURCE_ATTRIBUTES"]
            assert said == "k8s.namespace.name=imaging,k8s.pod.name=$(POD_NAME)"


def test_values_become_fields_of_pools(releases: Releases, tmp_path: Path) -> None:
    """Numbers, switches and texts; what is left out stays out."""
    pools = Pools.load(pools_file(releases["helm4", "proxy-pools"], tmp_path)).by_name
    assert pools["burst"] == Pool(
        name="burst",
        engine="cloudflare",
        step_price=0.00007,
        spend_per_day=20,
        tenant_spend_per_day=2.5,
        start_seconds=45,
    )
    assert not pools["partner"].is_external
    assert pools["gpu"] == Pool(name="gpu", engine="diffusion", model="stable-diffusion-v1-5/stable-diffusion-v1-5")
    small = Pools.load(pools_file(releases["helm4", "cpu-hpa"], tmp_path)).by_name["small"]
    assert (small.max_pixels, small.max_steps, small.max_queued) == (262144, 10, 20)


def test_every_field_of_a_pool_can_be_given(tmp_path: Path) -> None:
    """A field that the chart does not know could not be used on Kubernetes."""
    own = {
        "external": True, "maxQueued": 2_000_000, "maxSteps": 20, "maxPixels": 4_194_304, "startSeconds": 0.5,
        "jobPrice": 0, "stepPrice": 0.000001, "spendPerDay": 0, "tenantSpendPerDay": 1e6, "callsPerMinute": 1500,
    }  # fmt: skip
    pool = {"name": "all", "kind": "proxy", "upstream": {"existingSecret": "accounts"}, **own}
    pools = Pools.load(pools_file(render("helm4", MINIMAL | {"pools": [pool]}), tmp_path)).by_name
    expected = {"name": "all", "engine": "cloudflare", "model": None, **{_snake(key): own[key] for key in own}}
    assert msgspec.structs.asdict(pools["all"]) == expected


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


def test_routes_are_those_of_the_values(releases: Releases, tmp_path: Path) -> None:
    """In their order; without any all requests go to all pools."""
    pools = Pools.load(pools_file(releases["helm4", "proxy-pools"], tmp_path))
    named = pools.route("@cf/partner/model", RequestClass.INPAINTING)
    assert named is not None
    assert named.pools == ("partner",)
    text = pools.route(None, RequestClass.TEXT_TO_IMAGE)
    assert text is not None
    assert (text.pools, text.max_wait) == (("gpu", "burst"), 20)
    alone = Pools.load(pools_file(releases["helm4", "cpu-hpa"], tmp_path)).route(None, RequestClass.INPAINTING)
    assert alone is not None
    assert alone.pools == ("small", "large")


def test_texts_survive_the_file(tmp_path: Path) -> None:
    """Quotes, backslashes and what HTML would mind are the same in the end."""
    model = "a\"b\\c<d>&'e"
    values = MINIMAL | {"routes": [{"pools": ["cpu"]}, {"model": model, "pools": ["cpu"]}]}
    assert Pools.load(pools_file(render("helm4", values), tmp_path)).models == (model,)


def test_a_gateway_listens_for_others_with_keys_only(releases: Releases) -> None:
    """It has the tenants file, without which it would refuse to."""
    [(_, given)] = [found for found in processes(releases["helm4", "minimal"]) if found[0].endswith("/gateway")]
    assert given["IMG2IMG_HOST"] == "0.0.0.0"
    without = Settings.from_environment(
        {name: value for name, value in given.items() if name != "IMG2IMG_TENANTS_FILE"}
    )
    with pytest.raises(Exception, match="IMG2IMG_TENANTS_FILE"):
        load_tenants(without)
