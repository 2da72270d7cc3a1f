"""Which new prompts may not enter: duplicates, exact or near, and what overlaps the evaluation set.

Near duplicates are found with MinHash (Broder 1997) and locality-sensitive hashing (Leskovec, Rajaraman, Ullman: Mining
of Massive Datasets, section 3.4): memory and time grow with the prompts, not with their pairs.
"""

from collections.abc import Iterable, Iterator

from selfimprove import data

SHINGLE = 3  # words
PERMUTATIONS = 256  # of MinHash: the estimate of a similarity s has a standard deviation of sqrt(s (1 - s) / 256)
SEED = 1  # of the permutations; another one would judge border cases otherwise
RECALL = 0.999  # share of the pairs at the threshold that the hashing shows


class Seen:
    """The prompts that a new one may not repeat, added one by one."""

    def __init__(self, max_similarity: float) -> None:
        from datasketch import MinHash, MinHashLSH

        self._max_similarity = max_similarity
        self._empty = MinHash(num_perm=PERMUTATIONS, seed=SEED, scheme="affine32")
        self._near = MinHashLSH(num_perm=PERMUTATIONS, params=bands(max_similarity))
        self._sketches: list[MinHash] = []
        self._origins: list[str] = []
        self._exact: dict[str, int] = {}  # folded prompt -> its number

    def add(self, text: str, origin: str) -> None:
        """Remember a prompt; `origin` ends the reason it will give, as in "duplicate of a seed"."""
        sketch = self._sketch(text)
        self._near.insert(len(self._sketches), sketch)
        self._exact.setdefault(data.fold(text), len(self._sketches))
        self._sketches.append(sketch)
        self._origins.append(origin)

    def reason(self, text: str) -> str | None:
        """Why a prompt may not come again, by the most similar one that is remembered; None where it is new."""
        if (number := self._exact.get(data.fold(text))) is not None:
            return f"duplicate {self._origins[number]}"
        sketch = self._sketch(text)
        found = ((sketch.jaccard(self._sketches[n]), -n) for n in self._near.query(sketch))
        similarity, number = max(found, default=(0.0, 0))  # of equally similar ones the first
        return f"near duplicate {self._origins[-number]}" if similarity >= self._max_similarity else None

    def _sketch(self, text: str):  # type: ignore[no-untyped-def]  # datasketch has no types
        sketch = self._empty.copy()
        sketch.update_batch([shingle.encode() for shingle in shingles(text)])
        return sketch


class HeldOut:
    """The evaluation set, from which no prompt may be taken: neither whole nor `ngram` words in a row.

    A held-out prompt of fewer words may stand in no new one as a whole.
    """

    def __init__(self, texts: Iterable[str], ngram: int) -> None:
        self._whole: set[str] = set()
        self._grams: dict[int, set[str]] = {}  # by their length in words
        for text in texts:
            words = data.fold(text).split()
            self._whole.add(" ".join(words))
            if words:  # a text without a word shares none
                length = min(ngram, len(words))
                self._grams.setdefault(length, set()).update(_grams(words, length))

    def reason(self, text: str) -> str | None:
        """Why a prompt may not enter training; None where it may."""
        words = data.fold(text).split()
        if " ".join(words) in self._whole:
            return "in the evaluation set"
        shared = any(gram in known for length, known in self._grams.items() for gram in _grams(words, length))
        return "overlaps the evaluation set" if shared else None


def shingles(text: str) -> set[str]:
    """The word trigrams of the folded text; a shorter one is a single shingle."""
    words = data.fold(text).split()
    return set(_grams(words, min(SHINGLE, len(words))))


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
