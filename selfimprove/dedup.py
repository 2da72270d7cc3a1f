"""Which new prompts may not enter: duplicates, exact or near, and what overlaps the evaluation set.

Near duplicates are found with MinHash (Broder 1997) and locality-sensitive hashing (Leskovec, Rajaraman, Ullman: Mining
of Massive Datasets, section 3.4). What is found is what datasketch finds, but many prompts are looked at together, and
sketches.py keeps little of each in memory.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfimprove import columns, data, sketches

if TYPE_CHECKING:
    import numpy as np

SHINGLE = 3  # words
PERMUTATIONS = 256  # of MinHash: the estimate of a similarity s has a standard deviation of sqrt(s (1 - s) / 256)
SEED = 1  # of the permutations; another one would judge border cases otherwise
RECALL = 0.999  # share of the pairs at the threshold that the hashing shows
BATCH = 1_024  # prompts sketched at a time
TOGETHER = 16  # prompts whose permuted values stay in the processor's cache


class Seen:
    """The prompts that a new one may not repeat.

    Args:
        max_similarity: Jaccard, of word trigrams; from here on a near duplicate.
        folder: for a file of the sketches, 1 KiB a prompt; it has no name there and goes with this object. Unset = the
            system's folder of temporary files.
    """

    def __init__(self, max_similarity: float, folder: Path | None = None) -> None:
        from datasketch import MinHash

        # of datasketch itself, so that its sketches are ours
        self._permutations = MinHash(num_perm=PERMUTATIONS, seed=SEED, scheme="affine32").permutations
        self._index = sketches.Index(PERMUTATIONS, bands(max_similarity), max_similarity, folder)
        self._origins: list[str] = []  # each once
        self._first: list[int] = []  # number of the first prompt of an origin

    def add(self, texts: Iterable[str], origin: str) -> None:
        """Remember prompts; `origin` ends the reason they will give, as in "duplicate of a seed"."""
        for some in columns.batched(texts, BATCH):
            folded = [data.fold(text) for text in some]
            self._from_here(origin)
            self._index.add(self._sketch(folded), _digests(folded))

    def admit(self, texts: Iterable[str], origin: str) -> list[str | None]:
        """Why each of some prompts may not come, by the most similar one that is remembered; None where it is new.

        A new one is remembered, so that those after it may not repeat it.
        """
        found: list[str | None] = []
        for some in columns.batched(texts, BATCH):
            folded = [data.fold(text) for text in some]
            self._from_here(origin)
            for match in self._index.admit(self._sketch(folded), _digests(folded)):
                what = "duplicate" if match and match.exact else "near duplicate"
                found.append(f"{what} {self._origin(match.number)}" if match else None)
        return found

    def _from_here(self, origin: str) -> None:
        if not self._origins or self._origins[-1] != origin:
            self._origins.append(origin)
            self._first.append(len(self._index))

    def _origin(self, number: int) -> str:
        return next(o for o, first in zip(self._origins[::-1], self._first[::-1], strict=True) if first <= number)

    def _sketch(self, folded: Sequence[str]) -> "np.ndarray[Any, np.dtype[np.uint32]]":
        """MinHash of each folded text's shingles, (texts, PERMUTATIONS)."""
        import numpy as np

        grams = [_shingles(text) for text in folded]
        hashed = b"".join([hashlib.sha1(gram.encode()).digest()[:4] for own in grams for gram in own])
        values = sketches.mixed(np.frombuffer(hashed, "<u4"))
        starts = np.cumsum([0, *map(len, grams)])
        factors, offsets = self._permutations
        made = np.empty((len(folded), PERMUTATIONS), np.uint32)
        for k in range(0, len(folded), TOGETHER):
            some = starts[k : k + TOGETHER + 1]
            permuted = values[some[0] : some[-1], None] * factors
            permuted += offsets
            np.minimum.reduceat(permuted, some[:-1] - some[0], out=made[k : k + TOGETHER])
        return made


class HeldOut:
    """The evaluation set, from which no prompt may be taken: neither whole nor `ngram` words in a row.

    A held-out prompt of fewer words may stand in no new one as a whole.
    """

    def __init__(self, texts: Iterable[str], ngram: int) -> None:
        self._whole: set[str] = set()
        self._grams: dict[int, set[str]] = {}  # by their length in words
        self._threes: set[tuple[str, ...]] = set()  # of longer ones: what shares none of these shares none of those
        for text in texts:
            words = data.fold(text).split()
            self._whole.add(" ".join(words))
            if words:  # a text without a word shares none
                length = min(ngram, len(words))
                self._grams.setdefault(length, set()).update(_grams(words, length))
                self._threes.update(zip(words, words[1:], words[2:], strict=False))

    def reason(self, text: str) -> str | None:
        """Why a prompt may not enter training; None where it may."""
        words = data.fold(text).split()
        if " ".join(words) in self._whole:
            return "in the evaluation set"
        most = 2 if self._threes.isdisjoint(zip(words, words[1:], words[2:], strict=False)) else len(words)
        lengths = [length for length in self._grams if length <= most]
        shared = any(gram in self._grams[length] for length in lengths for gram in _grams(words, length))
        return "overlaps the evaluation set" if shared else None


def shingles(text: str) -> set[str]:
    """The word trigrams of the folded text; a shorter one is a single shingle."""
    return _shingles(data.fold(text))


def _shingles(folded: str) -> set[str]:
    words = folded.split()
    return set(_grams(words, min(SHINGLE, len(words))))


def _digests(folded: Sequence[str]) -> list[bytes]:
    """16 bytes of each text: two of the same are taken for the same text."""
    return [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in folded]


def bands(max_similarity: float) -> tuple[int, int]:
    """Bands, and rows in each: as many rows as leave a pair of exactly this similarity with a chance of RECALL.

    Pairs that share a band are compared; 1 - (1 - s^rows)^bands of the pairs of similarity s do.
    """
    for rows in range(PERMUTATIONS // 2, 1, -1):
        if 1 - (1 - max_similarity**rows) ** (PERMUTATIONS // rows) >= RECALL:
            return PERMUTATIONS // rows, rows
    return PERMUTATIONS, 1


def _grams(words: list[str], length: int) -> Iterator[str]:
    for i in range(len(words) - length + 1):
        yield " ".join(words[i : i + length])
