"""deploy/compose.yaml: Compose takes it, its services get settings that there are, and are shut in."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from img2img.pools import Pools
from img2img.settings import Settings
from tests.deploy.tools import tool

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
OURS: Final = ("gateway", "worker", "worker-gpu", "worker-proxy")
SERVICES: Final = (*OURS, "valkey", "keys", "collector", "tempo", "prometheus", "grafana")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """As Compose resolves them, with every profile and no variables."""
    command = [tool("docker-compose"), "--file", "deploy/compose.yaml", "--profile", "*", "config", "--format", "json"]
    ran = subprocess.run(command, cwd=DEPLOY.parent, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    found: dict[str, Any] = json.loads(ran.stdout)["services"]
    return found


def test_there_is_a_container_for_everything(services: dict[str, Any]) -> None:
    assert set(services) == set(SERVICES)


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_is_shut_in(services: dict[str, Any], name: str) -> None:
    """Read-only, without capabilities or a way to more of them, within limits; ports on this machine only."""
    service = services[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", []))


@pytest.mark.parametrize("name", OURS)
def test_a_process_of_ours_gets_settings_that_it_takes(services: dict[str, Any], name: str) -> None:
    Settings.from_environment({key: value or "" for key, value in services[name]["environment"].items()})


@pytest.mark.parametrize("name", OURS)
def test_a_process_of_ours_waits_for_a_healthy_queue_server_and_gets_time_to_drain(
    services: dict[str, Any], name: str
) -> None:
    service = services[name]
    assert service["depends_on"]["valkey"]["condition"] == "service_healthy"
    given = Settings.from_environment({key: value or "" for key, value in service["environment"].items()})
    needed = given.drain_timeout + (0 if name == "gateway" else given.lease)
    assert int(service["stop_grace_period"].removesuffix("s")) > needed


def test_the_queue_server_keeps_what_it_has(services: dict[str, Any]) -> None:
    """As docs/settings.md demands of IMG2IMG_REDIS_URL's."""
    command = " ".join(services["valkey"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert {volume["target"] for volume in services["valkey"]["volumes"]} == {"/data"}


def test_nobody_but_those_who_need_it_reaches_the_queue_server(services: dict[str, Any]) -> None:
    assert {name for name in SERVICES if "queue" in services[name].get("networks", {})} == {"valkey", *OURS}


def test_the_proxy_worker_finds_its_pool_in_the_file_that_comes_along(services: dict[str, Any]) -> None:
    pools = Pools.load(DEPLOY / "pools.toml").by_name
    proxy = services["worker-proxy"]["environment"]
    assert pools[proxy["IMG2IMG_QUEUE"]].engine == "cloudflare"
    assert pools[Settings().queue].engine == "diffusion"
    assert any(config["target"] == proxy["IMG2IMG_POOLS_FILE"] for config in services["worker-proxy"]["configs"])


def test_prometheus_scrapes_every_process_of_ours_where_it_listens(services: dict[str, Any]) -> None:
    jobs = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    found = {(name, sd["port"]) for job in jobs for sd in job["dns_sd_configs"] for name in sd["names"]}
    listening = set()
    for name in OURS:
        given = Settings.from_environment({key: value or "" for key, value in services[name]["environment"].items()})
        listening.add((name, given.http_port if name == "gateway" else given.metrics_port))
        assert (given.host if name == "gateway" else given.metrics_host) == "0.0.0.0"
    assert found == listening


def test_traces_go_from_our_processes_through_the_collector_to_tempo(services: dict[str, Any]) -> None:
    collector = yaml.safe_load((DEPLOY / "collector.yaml").read_text())
    port = collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2]
    assert {services[name]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] for name in OURS} == {
        f"http://collector:{port}"
    }
    host, _, port = collector["exporters"]["otlp_grpc/tempo"]["endpoint"].partition(":")
    tempo = yaml.safe_load((DEPLOY / "tempo.yaml").read_text())
    assert host in services
    assert tempo["distributor"]["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"] == f"0.0.0.0:{port}"


def test_the_collector_runs_what_it_declares() -> None:
    """In the order that a tail sampler needs: memory first, batches last."""
    collector = yaml.safe_load((DEPLOY / "collector.yaml").read_text())
    pipeline = collector["service"]["pipelines"]["traces"]
    assert pipeline["processors"] == ["memory_limiter", "tail_sampling", "batch"] == list(collector["processors"])
    assert pipeline["receivers"] == list(collector["receivers"])
    assert pipeline["exporters"] == list(collector["exporters"])
    policies = {policy["type"]: policy for policy in collector["processors"]["tail_sampling"]["policies"]}
    assert set(policies) == {"status_code", "latency", "probabilistic"}


def test_what_grafana_is_given_lies_where_it_looks(services: dict[str, Any]) -> None:
    mounted = {config["target"] for config in services["grafana"]["configs"]}
    providers = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/dashboards.yaml").read_text())["providers"]
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/datasources.yaml").read_text())["datasources"]
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in mounted
    assert all(any(target.startswith(provider["options"]["path"]) for target in mounted) for provider in providers)
    assert all(source["url"].split("/")[2].partition(":")[0] in services for source in sources)
