"""Where the drawings come from: npm packages at pinned versions, checked against their digests."""

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import click


class Package(NamedTuple):
    """An npm package; ``sha256`` is of its tarball."""

    name: str
    version: str
    sha256: str

    @property
    def tarball(self) -> str:
        """What ``npm pack`` calls the file."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


class Style(NamedTuple):
    """One set of drawings: ``words`` ask for it in a prompt, the rest is what its licence wants said."""

    key: str
    words: str
    package: Package
    title: str
    holder: str
    home: str
    licence: str
    licence_file: str


LABELS: Final = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
STYLES: Final = {
    style.key: style
    for style in (
        Style(
            "twemoji",
            "cartoon style",
            Package(
                "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
            ),
            "Twemoji",
            "Twitter, Inc and other contributors",
            "https://github.com/jdecked/twemoji",
            "CC-BY 4.0",
            "CC-BY-4.0.txt",
        ),
        Style(
            "noto",
            "noto style",
            Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
            "Noto Emoji",
            "Google LLC",
            "https://github.com/googlefonts/noto-emoji",
            "Apache License 2.0",
            "Apache-2.0.txt",
        ),
        Style(
            "flat",
            "flat style",
            Package(
                "@iconify-json/fluent-emoji-flat",
                "1.2.6",
                "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
            ),
            "Fluent Emoji, flat",
            "Microsoft Corporation",
            "https://github.com/microsoft/fluentui-emoji",
            "MIT License",
            "MIT-fluentui-emoji.txt",
        ),
        Style(
            "3d",
            "3d style",
            Package(
                "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
            ),
            "Fluent Emoji, 3D",
            "Microsoft Corporation",
            "https://github.com/microsoft/fluentui-emoji",
            "MIT License",
            "MIT-fluentui-emoji.txt",
        ),
    )
}


def fetch(package: Package, folder: Path) -> Path:
    """The package's tarball in ``folder``, from there or by ``npm pack``.

    Raises:
        click.ClickException: npm is missing or fails, or the tarball is not the pinned one.
    """
    tarball = folder / package.tarball
    if not tarball.exists():
        folder.mkdir(parents=True, exist_ok=True)
        spec = f"{package.name}@{package.version}"
        command = ["npm", "pack", "--loglevel=error", "--pack-destination", str(folder), spec]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - fixed words, pinned names
        except FileNotFoundError as exc:
            raise click.ClickException("npm is not there: install Node.js, whose package manager fetches it") from exc
        except subprocess.CalledProcessError as exc:
            raise click.ClickException(f"npm could not fetch {spec}: {exc.stderr.strip()}") from exc
    if hashlib.sha256(tarball.read_bytes()).hexdigest() != package.sha256:
        raise click.ClickException(f"{tarball} is not the file that was pinned: delete it and try again")
    return tarball


def read_labels(tarball: Path) -> list[dict[str, Any]]:
    """emojibase's English entries: ``hexcode``, ``label``, ``tags``, ``group``, ``order``, perhaps ``skins``."""
    entries: list[dict[str, Any]] = json.loads(_members(tarball, "package/en/data.json")["package/en/data.json"])
    return entries


def read_drawings(package: Package, tarball: Path) -> Iterator[tuple[str, str | bytes]]:
    """A package's drawings as (code points in hex with hyphens, an SVG's text or a bitmap's file)."""
    return _read_vectors(tarball) if package.name.startswith("@iconify-json/") else _read_bitmaps(tarball)


def _read_vectors(tarball: Path) -> Iterator[tuple[str, str]]:
    """What an Iconify package maps from code points to bodies of SVGs."""
    members = _members(tarball, "package/icons.json", "package/chars.json")
    icons = json.loads(members["package/icons.json"])
    for code, name in json.loads(members["package/chars.json"]).items():
        if icon := _icon(icons, name):
            width = icon.get("width", icons.get("width", 16))
            height = icon.get("height", icons.get("height", 16))
            yield (
                code,
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>',
            )


def _icon(icons: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The icon of that name or alias; an alias that turns its parent is another drawing and not taken."""
    alias = icons.get("aliases", {}).get(name, {})
    parent = alias["parent"] if alias.keys() == {"parent"} else name
    icon: dict[str, Any] | None = icons["icons"].get(parent)
    return icon


def _read_bitmaps(tarball: Path) -> Iterator[tuple[str, bytes]]:
    """The files ``assets/<code points>.webp``."""
    with tarfile.open(tarball) as archive:
        for member in archive:
            path = Path(member.name)
            if path.suffix == ".webp" and (file := archive.extractfile(member)):
                yield path.stem, file.read()


def _members(tarball: Path, *names: str) -> dict[str, bytes]:
    with tarfile.open(tarball) as archive:
        return {name: file.read() for name in names if (file := archive.extractfile(name))}
