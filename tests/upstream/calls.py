"""What the stand-in remembers of each call."""

from typing import Any, Literal

import msgspec

Ending = Literal["waiting", "answered", "closed", "gone"]


class Call(msgspec.Struct, kw_only=True):
    """One request to the API, in the order of arrival; times are seconds since the stand-in began.

    ``ended``: ``gone`` if the caller hung up before the whole answer was sent, ``closed`` if the stand-in closed the
    connection at its end or before, as it was told. ``image`` and ``mask`` say in which form they came. ``headers`` are
    the caller's, without its token.
    """

    number: int
    at: float
    account: str = ""
    token: str = ""
    path: str = ""
    model: str = ""
    headers: dict[str, str] = {}
    fields: dict[str, Any] = {}
    image: Literal["", "image", "image_b64"] = ""
    mask: bool = False
    body_bytes: int = 0
    behaviour: str = ""
    request_id: str = ""
    status: int = 0
    code: int | None = None
    ended: Ending = "waiting"
    ended_at: float | None = None
