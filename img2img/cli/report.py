"""What ``img2img up`` shows while it runs: a spinner on a terminal, plain lines anywhere else."""

from contextlib import suppress
from typing import Final

from rich.console import Console
from rich.status import Status
from rich.text import Text

STYLES: Final = {"gateway": "cyan", "worker": "green", "valkey": "magenta"}


class ConsoleReport:
    """Writes to stderr. A terminal that went away must not end what it watches, so no method raises."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._status: Status | None = None
        self._waiting = ""

    def child_line(self, name: str, line: str) -> None:
        style = STYLES.get(name.split()[0], "")
        self._print(Text.assemble((f"{name:<8}| ", style), Text.from_ansi(line)))

    def waiting(self, what: str) -> None:
        if what == self._waiting:
            return
        self._waiting = what
        with suppress(OSError):
            if not self._console.is_terminal:
                if what:
                    self._print(Text(f"Waiting for {what} …"))
            elif not what:
                self._stop_status()
            elif self._status is None:
                self._status = self._console.status(Text(f"Waiting for {what} …"))
                self._status.start()
            else:
                self._status.update(Text(f"Waiting for {what} …"))

    def say(self, text: str) -> None:
        self._print(Text(text, style="bold"))

    def _stop_status(self) -> None:
        status, self._status = self._status, None
        if status is not None:
            status.stop()

    def _print(self, text: Text) -> None:
        with suppress(OSError):
            self._console.print(text, soft_wrap=True)
