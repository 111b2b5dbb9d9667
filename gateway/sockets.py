"""The ports that a gateway listens on."""

import socket

from img2img.errors import ConfigurationError
from img2img.settings import PREFIX, Settings


def listen(settings: Settings, setting: str) -> socket.socket:
    """A socket that listens on the settings' host and the port that ``setting`` names.

    Raises:
        ConfigurationError: the port is taken or the host is not ours.
    """
    port: int = getattr(settings, setting)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, port), family=family, backlog=2048)
    except OSError as exc:
        why = (exc.strerror or str(exc)).partition(" (while")[0]  # the socket module names the address once more
        raise ConfigurationError(
            f"Cannot listen on {settings.host}:{port} ({why}): end what uses the port, or change "
            f"{PREFIX}{setting.upper()} (or IMG2IMG_HOST)"
        ) from exc
