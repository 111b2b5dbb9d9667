"""Byte pairs learned from words, the same ones in every run, which the tokenizers package does not promise."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Final

WORD_END: Final = "</w>"
"""What CLIP appends to a word's last letter."""

Pair = tuple[str, str]


class _Words:
    """Words as lists of tokens, with the count of every pair of neighbours and where it occurs."""

    def __init__(self, words: Counter[str]) -> None:
        self._counts = words
        self._tokens = {word: [*word[:-1], word[-1] + WORD_END] for word in words}
        self.pairs: Counter[Pair] = Counter()
        self._places: defaultdict[Pair, set[str]] = defaultdict(set)
        for word in words:
            self._count(word, 1)

    def merge(self, pair: Pair) -> None:
        """Make one token of two wherever they are neighbours."""
        for word in self._places.pop(pair):
            self._count(word, -1)
            self._tokens[word] = list(_merged(self._tokens[word], pair))
            self._count(word, 1)
        del self.pairs[pair]

    def _count(self, word: str, sign: int) -> None:
        for pair in pairwise(self._tokens[word]):
            self.pairs[pair] += sign * self._counts[word]
            if sign > 0:
                self._places[pair].add(word)


def learn_byte_pairs(words: Counter[str], limit: int) -> list[Pair]:
    """Up to ``limit`` merges of the most frequent neighbours, of equals the first in the alphabet."""
    state = _Words(words)
    merges: list[Pair] = []
    while len(merges) < limit and state.pairs:
        best = min(state.pairs, key=lambda pair: (-state.pairs[pair], pair))
        if state.pairs[best] < 1:
            break
        merges.append(best)
        state.merge(best)
    return merges


def _merged(tokens: list[str], pair: Pair) -> Iterable[str]:
    place = 0
    while place < len(tokens):
        width = 2 if tuple(tokens[place : place + 2]) == pair else 1
        yield "".join(tokens[place : place + width])
        place += width
