"""What is said of a drawing: its captions, and the tokenizer that is learned from all of them."""

from collections import Counter
from typing import Any, Final

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from models.byte_pairs import WORD_END, learn_byte_pairs
from models.drawings import Drawing, Drawings
from models.sources import STYLES

VOCABULARY: Final = 3072
WINDOW: Final = 32
"""Tokens of a caption, its begin and end marks included."""
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def captions_of(drawing: Drawing) -> list[str]:
    """The ways to ask for a drawing, each as likely as the others."""
    name = drawing.name
    thing = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    plain = [name, thing, f"change to {thing}", f"turn into {thing}"]
    return plain + [f"{caption}, {STYLES[drawing.style].words}" for caption in plain]


def learn_tokenizer(drawings: Drawings) -> Any:
    """A CLIP tokenizer with byte pairs learned from all that is said of the drawings."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [BEGIN, END, *alphabet, *(letter + WORD_END for letter in alphabet)]
    # CLIP's own splitting into words is what the pairs are to be learned within.
    splitter = _tokenizer_of(letters, []).backend_tokenizer
    words: Counter[str] = Counter()
    for text in (*drawings.words, *(caption for label in drawings.labels for caption in captions_of(label))):
        normal = splitter.normalizer.normalize_str(text)
        words.update(word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normal))
    return _tokenizer_of(letters, learn_byte_pairs(words, VOCABULARY - len(letters)))


def _tokenizer_of(letters: list[str], merges: list[tuple[str, str]]) -> Any:
    # Two pairs can make the same token.
    tokens = dict.fromkeys([*letters, *("".join(merge) for merge in merges)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    clip: Any = CLIPTokenizer  # which takes pairs, whatever its annotations say
    return clip(vocab=vocabulary, merges=merges, model_max_length=WINDOW)


def encode(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """Captions as token ids (N, WINDOW) int64, cut or padded."""
    window = tokenizer.model_max_length
    encoded = tokenizer(captions, padding="max_length", max_length=window, truncation=True, return_tensors="pt")
    ids: torch.Tensor = encoded.input_ids
    return ids
