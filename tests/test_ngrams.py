"""What the words of a text say about it alone."""

from selfimprove.ngrams import ngrams, repetition


def test_ngrams_are_words_in_a_row():
    assert list(ngrams(["a", "b", "c"], 2)) == [("a", "b"), ("b", "c")]
    assert list(ngrams(["a", "b"], 3)) == []


def test_repetition_is_the_share_of_repeated_four_word_sequences():
    assert repetition("one two three") == 0
    assert repetition("a b c d e f g h") == 0
    assert repetition("a b c d a b c d") == 1 - 4 / 5
