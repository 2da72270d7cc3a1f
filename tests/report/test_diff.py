"""What changed, word by word."""

import time

from hypothesis import given
from hypothesis import strategies as st

from selfimprove.report import diff
from selfimprove.report.diff import Piece

WORDY = st.text("ab ,.\n", max_size=80) | st.text(max_size=40)


@given(WORDY, WORDY)
def test_the_pieces_give_both_texts_back(old, new):
    pieces = diff.words(old, new)
    assert "".join(p.text for p in pieces if p.kind != "ins") == old
    assert "".join(p.text for p in pieces if p.kind != "del") == new
    assert all(p.text for p in pieces)


@given(WORDY)
def test_nothing_changed_is_nothing_marked(text):
    assert all(p.kind == "same" for p in diff.words(text, text))


def test_a_changed_word_is_marked_and_no_other():
    assert diff.words("the red fox ran", "the grey fox ran") == [
        Piece("same", "the "), Piece("del", "red"), Piece("ins", "grey"), Piece("same", " fox ran")
    ]  # fmt: skip


def test_a_space_between_two_changes_is_part_of_them():
    assert diff.words("one two", "three four") == [Piece("del", "one two"), Piece("ins", "three four")]


def test_texts_too_long_to_compare_are_not_compared():
    assert diff.words("word " * diff.MOST_WORDS, "word") is None


def test_the_worst_texts_take_no_long_time():
    """Two words in disorder, which difflib takes longest over."""
    import random

    rng = random.Random(0)
    old, new = (" ".join(rng.choices("ab", k=diff.MOST_WORDS // 2 - 1)) for _ in range(2))
    began = time.perf_counter()
    assert diff.words(old, new)
    assert time.perf_counter() - began < 5
