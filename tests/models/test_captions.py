"""Captions, and the vocabulary that is learned from them."""

from collections import Counter
from pathlib import Path

from models.byte_pairs import learn_byte_pairs
from models.captions import captions_of, encode, learn_tokenizer
from models.drawings import Drawing, open_drawings


def test_the_most_frequent_neighbours_are_merged_first() -> None:
    """Of equals the first in the alphabet; a pair that a merge took apart no longer counts."""
    merges = learn_byte_pairs(Counter({"lion": 3, "linen": 1, "on": 2}), 4)
    assert merges == [("o", "n</w>"), ("l", "i"), ("li", "on</w>"), ("e", "n</w>")]


def test_merging_ends_where_nothing_is_left_to_merge() -> None:
    assert learn_byte_pairs(Counter({"aaa": 1}), 9) == [("a", "a"), ("aa", "a</w>")]


def test_captions_have_the_name_with_its_article_and_the_style() -> None:
    captions = captions_of(Drawing("owl", "noto"))
    assert {"owl", "an owl", "change to an owl", "change to an owl, noto style"} < set(captions)


def test_captions_are_read_without_regard_to_case(emoji_folder: Path) -> None:
    tokenizer = learn_tokenizer(open_drawings(emoji_folder))
    ids = encode(tokenizer, ["Change to a LION", "change to a lion", "change to a dog"])
    assert ids.shape == (3, 32)
    assert ids[0].tolist() == ids[1].tolist() != ids[2].tolist()
    assert tokenizer.decode(ids[1], skip_special_tokens=True).strip() == "change to a lion"


def test_the_same_words_give_the_same_vocabulary(emoji_folder: Path) -> None:
    drawings = open_drawings(emoji_folder)
    one, two = (learn_tokenizer(drawings).backend_tokenizer.to_str() for _ in range(2))
    assert one == two


def test_letters_that_were_never_seen_are_tokens_too(emoji_folder: Path) -> None:
    """They would end the caption otherwise."""
    tokenizer = learn_tokenizer(open_drawings(emoji_folder))
    ids = tokenizer("ж 7", add_special_tokens=False).input_ids
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).strip() == "ж 7"
