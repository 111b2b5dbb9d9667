"""What the drawings show: emojibase's entries with names that people would say, the best known first."""

from pathlib import Path
from typing import Any, Final, NamedTuple

ANIMALS: Final = 3
GROUPS: Final = frozenset({0, ANIMALS, 4, 5, 6, 7})
"""Smileys, animals and plants, food, travel and places, activities, objects; people, symbols and flags stay out."""

NAMES: Final = {
    "hatching chick": "chick",
    "jack-o-lantern": "pumpkin",
    "smiling face with sunglasses": "cool smiley",
    "grinning face": "smiley",
    "automobile": "car",
    "high voltage": "lightning",
    "wrapped gift": "gift",
    "light bulb": "bulb",
    "crescent moon": "moon",
    "alarm clock": "clock",
    "gem stone": "diamond",
    "open book": "book",
}
"""Spoken names for labels that nobody types."""

BEST_KNOWN: Final = (Path(__file__).parent / "best_known.txt").read_text().splitlines()
"""The order in which ``--things N`` takes them; all others follow in Unicode's order."""


class Thing(NamedTuple):
    """One thing that is drawn in up to four styles; ``code`` is its code points without variation selectors."""

    code: str
    name: str
    tags: tuple[str, ...]


def things_of(entries: list[dict[str, Any]]) -> list[Thing]:
    """The things among emojibase's ``entries``, without those that come in skin tones, the best known first."""
    chosen = [entry for entry in entries if entry.get("group") in GROUPS and "skins" not in entry]
    faces = {_face(entry) for entry in chosen} & {entry["label"].lower() for entry in chosen}
    place = {name: index for index, name in enumerate(BEST_KNOWN)}
    chosen.sort(key=lambda entry: (place.get(_name(entry, faces), len(place)), entry["order"]))
    return [
        Thing(
            plain_code(entry["hexcode"]),
            _name(entry, faces),
            tuple(tag.lower() for tag in entry.get("tags", ())),
        )
        for entry in chosen
    ]


def plain_code(code: str) -> str:
    """``1F431-FE0F`` as ``1f431``: the sets differ in where they write variation selectors."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _name(entry: dict[str, Any], faces: set[str]) -> str:
    """An animal drawn both as a face and as a whole is meant by its face, as the drawings of most others are."""
    label: str = entry["label"].lower()
    if label in faces:
        return f"whole {label}"
    return _face(entry) if _face(entry) in faces else NAMES.get(label, label)


def _face(entry: dict[str, Any]) -> str:
    """The animal whose face an entry is, else nothing."""
    label: str = entry["label"].lower()
    return label.removesuffix(" face") if entry["group"] == ANIMALS and label.endswith(" face") else ""
