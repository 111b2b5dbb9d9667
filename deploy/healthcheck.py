"""The images' health check: asks the process beside it whether it is alive. Exit code 0 if so, else 1 with a line.

Standard library only and nothing of the service's own, since it starts anew every ten seconds.
"""

import http.client
import os
import ssl
import sys
from collections.abc import Mapping
from typing import Final

SECONDS: Final = 4.0
WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - listened on by others
VARIABLES: Final = {
    "gateway": ("IMG2IMG_HOST", "IMG2IMG_HTTP_PORT", "8000"),
    "worker": ("IMG2IMG_METRICS_HOST", "IMG2IMG_METRICS_PORT", "9464"),
}


def find_fault(program: str, environment: Mapping[str, str]) -> str:
    """What keeps ``program`` from being healthy, by the variables that it was started with; empty if nothing."""
    host_variable, port_variable, default = VARIABLES[program]
    host = environment.get(host_variable) or "127.0.0.1"
    port = int(environment.get(port_variable) or default)
    if port < 0:
        return ""  # told to serve no health: that it runs is all that can be known
    if port == 0:
        return f"{port_variable}=0 takes any port: give it one, so that the health check finds it"
    address = WILDCARDS.get(host, host)
    if program == "gateway" and environment.get("IMG2IMG_TLS_CERT"):
        # The certificate names the service, not this address; nothing but the status is read here.
        context = ssl._create_unverified_context()  # noqa: S323
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            address, port, timeout=SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(address, port, timeout=SECONDS)
    try:
        connection.request("GET", "/health/live")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as exc:
        return f"no answer from {address}:{port}: {exc!r}"
    finally:
        connection.close()
    return "" if status == http.client.OK else f"{address}:{port} answered {status}"


if __name__ == "__main__":
    fault = find_fault(sys.argv[1], os.environ)
    if fault:
        sys.stderr.write(f"unhealthy: {fault}\n")
        sys.exit(1)
