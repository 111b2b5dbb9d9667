"""Which web pages may use a service without keys."""

import pytest

from gateway.rest.pages import refuse_foreign_pages
from img2img.errors import MissingCredentials

OWN = [
    "localhost",
    "localhost:8000",
    "LOCALHOST.",
    "127.0.0.1:8000",
    "[::1]:8000",
    "gateway:8000",
    "box.local",
    "host.docker.internal",
]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "[::1",
    "evil.example.",
]


@pytest.mark.parametrize("host", ["", "192.0.2.7", "[2001:db8::1]:80", *OWN])
def test_no_page_of_another_site_has_such_a_host(host: str) -> None:
    refuse_foreign_pages({"host": host})
    refuse_foreign_pages({})


@pytest.mark.parametrize("origin", ["", *(f"http://{host}" for host in OWN)])
def test_a_page_of_this_machine_may(origin: str) -> None:
    refuse_foreign_pages({"host": "localhost:8000", "origin": origin})


@pytest.mark.parametrize("host", ["192.0.2.7:8000", "[2001:db8::1]", *OWN])
def test_a_page_of_the_service_itself_may(host: str) -> None:
    """Such as its reference, by whatever address a tunnel has."""
    refuse_foreign_pages({"host": host, "origin": f"https://{host}"})


@pytest.mark.parametrize(
    "headers",
    [
        *({"host": host} for host in FOREIGN),
        *({"host": "localhost", "origin": f"https://{host}"} for host in (*FOREIGN, "192.0.2.7", "[2001:db8::1]:80")),
        {"host": "evil.example", "origin": "https://evil.example"},
        {"host": "192.0.2.7:8000", "origin": "https://192.0.2.7"},
        {"host": "localhost", "origin": "null"},
        {"origin": "null"},
        {"host": "localhost", "origin": "file://"},
    ],
    ids=lambda headers: " of ".join(headers.values()),
)
def test_a_page_of_another_site_may_not(headers: dict[str, str]) -> None:
    """By what it asks for, or by its name, which somebody has made mean this machine."""
    with pytest.raises(MissingCredentials, match=r"call it as localhost, or give it keys \(IMG2IMG_TENANTS_FILE\)"):
        refuse_foreign_pages(headers)
