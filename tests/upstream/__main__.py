"""Run the stand-in until Ctrl-C: ``python -m tests.upstream --port 8787``."""

import argparse
import asyncio
import json
import sys
from contextlib import suppress

from tests.upstream.api import Api
from tests.upstream.server import Upstream


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description="A stand-in for Cloudflare's API.")
    parser.add_argument("--port", type=int, default=8787, help="of 127.0.0.1; 0 takes any free one")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that a good answer takes")
    parser.add_argument(
        "--token", action="append", metavar="ACCOUNT=TOKEN", help="an account and its token; without, any will do"
    )
    options = parser.parse_args()
    tokens = dict(pair.split("=", 1) for pair in options.token) if options.token else None
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(tokens, options.delay, options.port))


async def serve(tokens: dict[str, str] | None, delay: float, port: int) -> None:
    async with Upstream(Api(tokens, delay), port) as upstream:
        sys.stdout.write(json.dumps({"event": "upstream_ready", "url": upstream.url, "port": upstream.port}) + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    main()
