"""Which web pages may use a service that asks for no keys: those of this machine.

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
    if (host and not _is_own(f"//{host}", any_address=True)) or (origin and not _is_own(origin, any_address=False)):
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
