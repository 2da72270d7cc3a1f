"""N-grams of words, and how much of a text repeats them. Words are what white space separates."""

from collections.abc import Iterator, Sequence

REPEATED = 4  # words in a row


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every `n` words in a row; none where there are fewer."""
    return zip(*(words[k:] for k in range(n)), strict=False)


def repetition(text: str) -> float:
    """Share of the four-word sequences of a text that stand in it before (0 for texts of fewer than four words)."""
    grams = list(ngrams(text.split(), REPEATED))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
