"""Which web pages may use a service that asks for no keys: those of this machine, and its own.

Browsers send what any page asks for to loopback, too. They keep the answer from a page of another site, but its job
would run, and may cost money; and a site whose name is made to mean this machine (DNS rebinding) would see all answers.
Its name is in ``Host`` then. Nobody else can have addresses, names without a dot, and the suffixes below.
"""

from collections.abc import Mapping
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from img2img.errors import MissingCredentials

OWN_SUFFIXES: Final = (".localhost", ".local", ".internal")


def refuse_foreign_pages(headers: Mapping[str, str]) -> None:
    """Let everybody pass but a web page of another site; ``headers`` are the request's, with small letters.

    Raises:
        MissingCredentials: it is one.
    """
    host, origin = headers.get("host", ""), headers.get("origin", "")
    # Its own pages come from where it is itself, by whatever address they reach it, as through a tunnel.
    is_own_page = bool(host) and origin.partition("://")[2] == host
    is_welcome = not origin or is_own_page or _is_own(origin, any_address=False)
    if not is_welcome or (host and not _is_own(f"//{host}", any_address=True)):
        raise MissingCredentials(
            "Without keys only pages of this machine may use the service: call it as localhost, or give it keys "
            "(IMG2IMG_TENANTS_FILE)"
        )


def _is_own(url: str, *, any_address: bool) -> bool:
    try:
        name = (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return False
    try:
        address = ip_address(name)
    except ValueError:
        return bool(name) and ("." not in name or name.endswith(OWN_SUFFIXES))
    return any_address or address.is_loopback
