"""How much of large requests one process holds at a time, over all of its front ends."""

from types import TracebackType
from typing import Final, Self

from img2img.errors import RequestTooLarge, TooManyBytesInFlight

# A body is in memory beside what it decodes to, which is at most as large: base64 becomes a string of the
# same size, an array at most half of it in bytes, a protobuf message a copy.
DECODE_FACTOR: Final = 2
SMALL_BODY: Final = 64 * 1024
SMALL_BUDGET: Final = 32 * 1024 * 1024


class ByteBudget:
    """How many bytes of request bodies may be held at a time, decoding included."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = 0

    def reserve(self) -> "Reservation":
        """An empty share of the budget: enter it with ``with``, which gives everything back at the end."""
        return Reservation(self)


class Reservation:
    """One request's share of a :class:`ByteBudget`, from its first byte until its pictures are stored."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._held = 0

    def check(self, body_bytes: int) -> None:
        """Whether a body of ``body_bytes`` could be held now; takes nothing.

        Raises:
            TooManyBytesInFlight: the others hold too much now.
            RequestTooLarge: this body would not fit if it were alone.
        """
        needed = body_bytes * DECODE_FACTOR
        if needed > self._budget.limit:
            raise RequestTooLarge(
                f"A body of {body_bytes} bytes needs {needed} bytes and IMG2IMG_MAX_BODY_BYTES_IN_FLIGHT is "
                f"{self._budget.limit}: send a smaller picture"
            )
        if self._budget.in_use + needed - self._held > self._budget.limit:
            raise TooManyBytesInFlight("The server is busy reading other requests: send this one again soon")

    def hold(self, body_bytes: int) -> None:
        """Grow the share to what a body of ``body_bytes`` needs; it never shrinks before its end.

        Raises as :meth:`check` does.
        """
        self.check(body_bytes)
        more = max(0, body_bytes * DECODE_FACTOR - self._held)
        self._budget.in_use += more
        self._held += more

    def release(self) -> None:
        """Give everything back, because nothing of the body is in memory any more; may be repeated."""
        self._budget.in_use -= self._held
        self._held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Budgets:
    """One per process. Small bodies have a budget of their own: large ones do not keep them out."""

    def __init__(self, limit: int) -> None:
        self.large = ByteBudget(limit)
        self.small = ByteBudget(SMALL_BUDGET)

    def reserve(self, body_bytes: int | None) -> Reservation:
        """An empty share for a body of so many bytes; None where that is not known beforehand."""
        small = body_bytes is not None and body_bytes <= SMALL_BODY
        return (self.small if small else self.large).reserve()
