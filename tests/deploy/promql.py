"""Which series and labels a PromQL expression speaks of; its syntax is promtool's business."""

import re
from typing import Final, NamedTuple

STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'')
GROUPING: Final = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
RANGE: Final = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
SELECTOR: Final = re.compile(r"(?<![\w.])([A-Za-z_:][\w:]*)\s*(?:\{([^}]*)\}|(?!\s*\()(?![\w:]))")
MATCHER: Final = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
KEYWORDS: Final = frozenset({"and", "or", "unless", "bool", "by", "without", "on", "ignoring"})


class Spoken(NamedTuple):
    """``selectors``: each series with the labels that its matchers name; ``grouped``: labels of by, on and the like."""

    selectors: list[tuple[str, frozenset[str]]]
    grouped: frozenset[str]


def parse(expression: str) -> Spoken:
    text = STRING.sub('""', expression)
    grouped = {label for _, labels in GROUPING.findall(text) for label in re.findall(r"\w+", labels)}
    text = RANGE.sub("", GROUPING.sub(" ", text))
    selectors = [
        (name, frozenset(MATCHER.findall(matchers)))
        for name, matchers in SELECTOR.findall(text)
        if name not in KEYWORDS
    ]
    return Spoken(selectors, frozenset(grouped))
