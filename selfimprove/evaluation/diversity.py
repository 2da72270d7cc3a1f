"""How alike texts are: distinct n-grams, self-BLEU, compression, cosine, repetition. Pure, linear in the texts.

Every one of these figures but the cosine and the repetition depends on how much text it looks at: the more words, the
more of them have been seen before. `compare` therefore looks at equally much of every collection. Words are what white
space separates, so for languages without it only the compression and the cosine mean something.
"""

import bisect
import math
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from selfimprove.ngrams import ngrams, repetition

if TYPE_CHECKING:
    import numpy as np

ORDER = 4  # longest n-gram of BLEU
NO_MATCH = 0.1  # counted for an n-gram order without a match: smoothing method 1 of Chen and Cherry (2014), as in NLTK
TEXTS = 1000  # of a collection that `compare` looks at, at most,
WORDS = 30_000  # of them together, after which no further text is looked at;
BLEU_TEXTS = 300  # of these for self-BLEU,
BIGRAMS = 20_000  # and for the distinct share
FEWEST = 50  # bigrams; of fewer a share says nothing


class Diversity(NamedTuple):
    """What `compare` finds of a collection of texts; None where there is too little to look at."""

    texts: int  # looked at
    distinct: float | None  # distinct share of the word bigrams
    self_bleu: float | None  # mean BLEU-4 of a text against the others: 1 where all are the same
    compression: float | None  # bytes before / bytes after: higher is more alike
    repetition: float | None  # mean share of repeated four-word sequences inside a text


def compare(collections: Sequence[Sequence[str]], seed: int = 0) -> list[Diversity]:
    """Measure collections of texts by equally much of each: as much as the smallest one has, of a sample.

    Distinct bigrams are rarefied to the smallest number of bigrams (see `distinct`), self-BLEU takes as many texts, and
    the compression as many bytes of the texts in random order. A collection of fewer than 50 bigrams has no distinct
    share and shortens nobody else's.
    """
    shuffled = [_sample(texts, random.Random(seed)) for texts in collections]
    worded = [[words for text in texts if (words := text.split())] for texts in shuffled]
    counts = [Counter(gram for words in texts for gram in ngrams(words, 2)) for texts in worded]
    totals = [count.total() for count in counts]
    joined = ["\n".join(texts).encode("utf-8", errors="replace") for texts in shuffled]
    bigrams = min([BIGRAMS, *(total for total in totals if total >= FEWEST)])
    number = min([BLEU_TEXTS, *(len(texts) for texts in worded if len(texts) > 1)])
    size = min([len(data) for data in joined if data], default=0)
    return [
        Diversity(
            texts=len(shuffled[i]),
            distinct=_rarefied(counts[i], bigrams) if totals[i] >= FEWEST else None,
            self_bleu=self_bleu(worded[i][:number]),
            compression=compression(joined[i][:size]),
            repetition=repeated(shuffled[i]),
        )
        for i in range(len(shuffled))
    ]


def _sample(texts: Sequence[str], rng: random.Random) -> list[str]:
    """At most TEXTS of the texts in random order, until they have WORDS words."""
    taken, words = [], 0
    for text in rng.sample(texts, min(TEXTS, len(texts))):
        taken.append(text)
        words += len(text.split())
        if words >= WORDS:
            break
    return taken


def distinct(texts: Iterable[str], n: int = 2, size: int | None = None) -> float | None:
    """Share of distinct n-grams (distinct-n, arXiv 1510.03055), expected among `size` of them; None of too few.

    That is what drawing `size` n-grams without replacement gives on average, in closed form: rarefaction (Hurlbert
    1971). `size` None is all of them, the plain distinct-n.
    """
    counts = Counter(gram for text in texts for gram in ngrams(text.split(), n))
    return _rarefied(counts, counts.total() if size is None else size)


def _rarefied(counts: Counter[Any], size: int) -> float | None:
    total = counts.total()
    if not 0 < size <= total:
        return None
    how_often = Counter(counts.values())
    seen = sum(kinds * (1 - _missed(total, count, size)) for count, kinds in how_often.items())
    return seen / size


def _missed(total: int, count: int, size: int) -> float:
    """Chance that none of `count` of `total` things is among `size` that are drawn."""
    if total - count < size:
        return 0.0
    log = math.lgamma
    return math.exp(
        log(total - count + 1) - log(total - count - size + 1) - log(total + 1) + log(total - size + 1)
    )  # (total - count over size) / (total over size)


def self_bleu(texts: Sequence[Sequence[str]]) -> float | None:
    """Mean sentence BLEU-4 of each text, as words, against all others (arXiv 1802.01886); None of fewer than two.

    As NLTK's sentence_bleu with smoothing method 1 and `auto_reweigh` for texts of fewer than four words. An n-gram
    counts as often as it stands in the text where it stands most, the own one apart: two numbers an n-gram are enough
    to know that, so that the time is linear in the texts.
    """
    if len(texts) < 2:
        return None
    lengths = Counter(map(len, texts))
    known = sorted(lengths)
    logs = [0.0] * len(texts)
    for n in range(1, ORDER + 1):
        counts = [Counter(ngrams(words, n)) for words in texts]
        tops = _two_largest(counts)
        for i, own in enumerate(counts):
            orders = min(ORDER, len(texts[i]))
            if n > orders:
                continue
            hits = sum(min(count, tops[gram][1 if tops[gram][2] == i else 0]) for gram, count in own.items())
            precision = (hits or (NO_MATCH if n > 1 else 0)) / own.total()
            logs[i] += math.log(precision) / orders if precision else -math.inf
    brevity = [min(0.0, 1 - _closest(len(words), lengths, known) / len(words)) for words in texts]
    return math.fsum(math.exp(log + b) for log, b in zip(logs, brevity, strict=True)) / len(texts)


def _two_largest(counts: Sequence[Counter[Any]]) -> dict[Any, tuple[int, int, int]]:
    """Of each n-gram its largest count in a text, the largest in another text, and which text the first one is."""
    tops: dict[Any, tuple[int, int, int]] = {}
    for i, own in enumerate(counts):
        for gram, count in own.items():
            first, second, where = tops.get(gram, (0, 0, -1))
            if count > first:
                tops[gram] = (count, first, i)
            elif count > second:
                tops[gram] = (first, count, where)
    return tops


def _closest(length: int, lengths: Counter[int], known: Sequence[int]) -> int:
    """The length of another text that is closest, the shorter one of two."""
    if lengths[length] > 1:
        return length
    at = bisect.bisect_left(known, length)
    return min((*known[max(0, at - 1) : at], *known[at + 1 : at + 2]), key=lambda other: (abs(other - length), other))


def compression(data: bytes) -> float | None:
    """Bytes before over bytes after zlib (arXiv 2403.00553): repeated text shrinks to little. None of nothing."""
    return len(data) / len(zlib.compress(data)) if data else None


def repeated(texts: Sequence[str]) -> float | None:
    """Mean share of repeated four-word sequences inside a text; None of no text."""
    return sum(map(repetition, texts)) / len(texts) if texts else None


def mean_cosine(vectors: "np.ndarray[Any, np.dtype[Any]]") -> float | None:
    """Mean cosine between two different rows of (N, D), over all pairs; None of fewer than two.

    The squared length of the sum of the unit vectors holds every pair's cosine twice and every vector's own once.

    Raises:
        ValueError: a row without direction.
    """
    import numpy as np

    n = len(vectors)
    if n < 2:
        return None
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=float))
    if not lengths.all():
        raise ValueError("a vector of length zero has no cosine")
    total = np.einsum("ij,i->j", vectors, 1 / lengths, dtype=float)
    return float((total @ total - n) / (n * (n - 1)))
