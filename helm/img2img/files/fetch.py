"""Downloads a model's weights and checks them: fetch.py URL SHA256 FILE.

An init container of workers runs it. The file appears whole or not at all; one that is there and right stays. The
header ``Authorization`` of the request comes from the variable AUTHORIZATION, if that is set.
"""

import hashlib
import http.client
import os
import shutil
import sys
import urllib.request
from pathlib import Path

CHUNK = 1024 * 1024  # bytes
SILENCE = 60.0  # seconds


def digest_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(url: str, sha256: str, file: Path) -> str:
    """Have the file there; answers what was done.

    Raises:
        ValueError: what came is not what was expected.
        OSError, HTTPException: it could not be had, or not be written.
    """
    if file.is_file() and digest_of(file) == sha256:
        return "is there already"
    headers = {"Authorization": os.environ["AUTHORIZATION"]} if os.environ.get("AUTHORIZATION") else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    try:
        # The chart lets no other URLs in than those of HTTP.
        request = urllib.request.Request(url, headers=headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=SILENCE) as answer, part.open("wb") as stream:  # noqa: S310
            shutil.copyfileobj(answer, stream, CHUNK)
        found = digest_of(part)
        if found != sha256:
            raise ValueError(f"its SHA-256 is {found}, not {sha256}: change weights.download.sha256, or the URL")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return f"has {file.stat().st_size:,} bytes"


def main() -> None:
    url, sha256, file = sys.argv[1:]
    try:
        done = fetch(url, sha256, Path(file))
    except (ValueError, OSError, http.client.HTTPException) as exc:
        sys.exit(f"{url}: {exc}")
    sys.stderr.write(f"{file} {done}\n")


if __name__ == "__main__":
    main()
