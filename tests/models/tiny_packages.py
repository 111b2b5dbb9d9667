"""A handful of drawings in the formats of the packages that they come in, so that no test needs the network."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from models.sources import Package

LABELS = (
    {"label": "lion", "hexcode": "1F981", "tags": ["mane", "Leo"], "group": 3, "order": 3},
    {"label": "dog", "hexcode": "1F415", "tags": ["pet"], "group": 3, "order": 1},
    {"label": "dog face", "hexcode": "1F436", "tags": ["pet"], "group": 3, "order": 2},
    {"label": "waving hand", "hexcode": "1F44B", "tags": [], "group": 1, "order": 4},
    {"label": "person golfing", "hexcode": "1F3CC-FE0F", "tags": [], "group": 6, "order": 5, "skins": []},
)
SHAPES = {
    "1f981": '<circle cx="16" cy="16" r="15" fill="#fc0"/><circle cx="11" cy="13" r="3"/>',
    "1f415": '<path d="M2 20h28v10H2z" fill="#f00"/>',
    "1f436": '<path d="M4 4h10v24H4z" fill="#840"/>',
    "1f44b": '<path d="M0 0h32v32H0z"/>',
}


def pack(folder: Path, name: str, files: dict[str, bytes]) -> Package:
    """Write a package's tarball where it would have been fetched to."""
    package = Package(name, "1.0.0", "")
    folder.mkdir(exist_ok=True, parents=True)
    with tarfile.open(folder / package.tarball, "w:gz") as archive:
        for path, data in files.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return package._replace(sha256=hashlib.sha256((folder / package.tarball).read_bytes()).hexdigest())


def pack_labels(folder: Path) -> Package:
    """Labels as emojibase-data has them."""
    return pack(folder, "emojibase-data", {"en/data.json": json.dumps(LABELS).encode()})


def pack_vectors(folder: Path, name: str) -> Package:
    """Drawings as Iconify's packages have them, one of them under an alias."""
    icons = {f"icon-{code}": {"body": body} for code, body in SHAPES.items()}
    data = {"width": 32, "height": 32, "icons": icons, "aliases": {"king": {"parent": "icon-1f981"}}}
    chars = {code: "king" if code == "1f981" else f"icon-{code}" for code in SHAPES}
    return pack(folder, name, {"icons.json": json.dumps(data).encode(), "chars.json": json.dumps(chars).encode()})


def pack_bitmaps(folder: Path, name: str) -> Package:
    """One drawing as the package of 3D ones has it, wider than high, with a variation selector in its name."""
    file = io.BytesIO()
    Image.new("RGBA", (64, 32), (0, 0, 255, 255)).save(file, "WEBP", lossless=True)
    return pack(folder, name, {"assets/1f981-fe0f.webp": file.getvalue()})
