"""An index of MinHash sketches that grows by many at a time and stays small.

Of each sketch the bands' hashes (4 bytes a band) and the lowest byte of each value are kept in memory, the sketch
itself in a file. Two sketches are compared where they share a band, as in datasketch's MinHashLSH. The bytes rule out
those that cannot be similar enough; of the others the file says the rest, so that what is found is exact.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    Sketches = np.ndarray[Any, np.dtype[np.uint32]]
    Numbers = np.ndarray[Any, np.dtype[Any]]

FIRST = 1 << 12  # sketches for which there is room at the beginning
COMPARED = 1 << 14  # sketches compared at a time


class Match(NamedTuple):
    """A sketch that is known: its number, and whether the text is the same."""

    number: int
    exact: bool


class Index:
    """Sketches by number, in the order in which they came.

    Args:
        width: values of a sketch.
        bands: how many, and of how many values each.
        threshold: share of equal values from which two are similar.
        folder: for the file of sketches, which has no name; unset = the system's for temporary files.
    """

    def __init__(self, width: int, bands: tuple[int, int], threshold: float, folder: Path | None) -> None:
        import numpy as np

        self._width, (self._bands, self._rows), self._threshold = width, bands, threshold
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # goes with this object
        self._number = 0
        self._digests = np.zeros((FIRST, 16), np.uint8)
        self._bytes = np.zeros((FIRST, width), np.uint8)
        # chains: `heads` by the lowest bits of a band's hash, then `after`; an entry is number * bands + band, plus 1
        self._hashes = np.zeros((FIRST, self._bands), np.uint32)
        self._after = np.zeros((FIRST, self._bands), np.uint32)
        self._heads = np.zeros(_heads(FIRST * self._bands), np.uint32)

    def __len__(self) -> int:
        return self._number

    def add(self, sketches: "Sketches", digests: Sequence[bytes]) -> None:
        """Put sketches, with the digests of their texts, behind those that are there."""
        import numpy as np

        self._put(sketches, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16), self._hashed(sketches))

    def admit(self, sketches: "Sketches", digests: Sequence[bytes]) -> list[Match | None]:
        """For each sketch the same text that came first, else the most similar one; where none is, it is put in.

        Of equally similar ones the first that came counts. One that is put in can be found by those after it.
        """
        import numpy as np

        rows = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
        hashes = self._hashed(sketches)
        found = self._known(sketches, rows, hashes)
        fresh = _Batch(self._number, sketches, self._bands, self._rows, self._threshold)
        alone = _alone(hashes).tolist()
        matches: list[Match | None] = []
        for i, digest in enumerate(digests):
            best = found.get(i)
            if not alone[i] and not (best and best.match.exact):
                best = fresh.better(i, digest, hashes[i].tolist(), best)
            elif best is None:
                fresh.taken.append(i)
            matches.append(best.match if best else None)
        self._put(sketches[fresh.taken], rows[fresh.taken], hashes[fresh.taken])
        return matches

    def _hashed(self, sketches: "Sketches") -> "Sketches":
        """A hash of each band and its place."""
        import numpy as np

        values = sketches[:, : self._bands * self._rows].reshape(-1, self._bands, self._rows).astype(np.uint64)
        hashes = np.broadcast_to(np.arange(1, self._bands + 1, dtype=np.uint64), values.shape[:2]).copy()
        for k in range(self._rows):
            hashes = (hashes ^ values[:, :, k]) * np.uint64(0x9E3779B97F4A7C15)
            hashes ^= hashes >> np.uint64(29)
        return (hashes >> np.uint64(16)).astype(np.uint32)

    def _put(self, sketches: "Sketches", digests: "Numbers", hashes: "Sketches") -> None:
        import numpy as np

        begin, end = self._number, self._number + len(sketches)
        if end > len(self._hashes):
            self._grow(end)
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(sketches).tobytes())
        self._digests[begin:end] = digests
        self._bytes[begin:end] = sketches.astype(np.uint8)
        self._hashes[begin:end] = hashes
        self._number = end
        self._chain(begin, end)

    def _chain(self, begin: int, end: int) -> None:
        """Enter the bands of some sketches; those of one chain one after the other."""
        import numpy as np

        slots, order = _sorted(self._hashes[begin:end].ravel() & np.uint32(len(self._heads) - 1))
        entries = (order + begin * self._bands + 1).astype(np.uint32)
        first = np.ones(len(slots), bool)  # of its chain in this part
        first[1:] = slots[1:] != slots[:-1]
        before = np.empty_like(entries)
        before[1:] = entries[:-1]
        before[first] = self._heads[slots[first]]
        self._after.reshape(-1)[entries - 1] = before
        last = np.ones(len(slots), bool)
        last[:-1] = first[1:]
        self._heads[slots[last]] = entries[last]

    def _grow(self, needed: int) -> None:
        import numpy as np

        room = len(self._hashes)
        while room < needed:
            room *= 2
        for array in (self._digests, self._bytes, self._hashes, self._after):
            array.resize((room, array.shape[1]), refcheck=False)
        size = _heads(room * self._bands)
        if size != len(self._heads):
            self._heads = np.zeros(size, np.uint32)
            for begin in range(0, self._number, COMPARED):
                self._chain(begin, min(self._number, begin + COMPARED))

    def _known(self, sketches: "Sketches", digests: "Numbers", hashes: "Sketches") -> "dict[int, _Best]":
        """The best of what is already there for each new sketch, where there is any."""
        import numpy as np

        found: dict[int, _Best] = {}
        low = sketches.astype(np.uint8)
        for queries, numbers in self._candidates(hashes):
            same = (self._digests[numbers] == digests[queries]).all(axis=1)
            near = (self._bytes[numbers] == low[queries]).sum(axis=1, dtype=np.uint16) >= self._threshold * self._width
            for i, number, exact in zip(*(a[same | near].tolist() for a in (queries, numbers, same)), strict=True):
                if not exact:
                    equal = self._stored(number) == sketches[i]
                    similarity = float(np.count_nonzero(equal)) / self._width
                    if similarity < self._threshold or not _share_a_band(equal, self._bands, self._rows):
                        continue
                best = _Best(exact, 1.0 if exact else similarity, -number)
                found[i] = max(found.get(i, best), best)
        return found

    def _candidates(self, hashes: "Sketches") -> "Iterator[tuple[Numbers, Numbers]]":
        """Pairs of a new sketch and a number that have a band's hash in common; a pair may come twice."""
        import numpy as np

        wanted = hashes.ravel()
        places = np.arange(len(wanted))
        entries = self._heads[wanted & np.uint32(len(self._heads) - 1)]
        flat = self._hashes.reshape(-1), self._after.reshape(-1)
        held: list[Numbers] = []
        while len(places := places[there := entries > 0]):
            entries = entries[there] - np.uint32(1)
            hit = flat[0][entries] == wanted[places]
            if hit.any():
                held.append((places[hit] // self._bands << 32) | (entries[hit] // self._bands))
            if sum(map(len, held)) >= COMPARED:
                yield from _pairs(held)
                held = []
            entries = flat[1][entries]
        yield from _pairs(held)

    def _stored(self, number: int) -> "Sketches":
        import numpy as np

        self._file.seek(number * self._width * 4)
        return np.frombuffer(self._file.read(self._width * 4), np.uint32)


class _Best(NamedTuple):
    """Ordered: the same text first, then the most similar, then the first that came."""

    exact: bool
    similarity: float
    negative: int  # of the number

    @property
    def match(self) -> Match:
        return Match(-self.negative, self.exact)


class _Batch:
    """The sketches of one batch among themselves; only those that are taken can be found."""

    def __init__(self, begin: int, sketches: "Sketches", bands: int, rows: int, threshold: float) -> None:
        self._begin, self._sketches, self._bands, self._rows = begin, sketches, bands, rows
        self._threshold = threshold
        self._texts: dict[bytes, int] = {}  # digest -> number
        self._by_hash: dict[int, list[int]] = {}  # of a band -> places among `taken`
        self.taken: list[int] = []  # their places in the batch

    def better(self, i: int, digest: bytes, hashes: list[int], best: _Best | None) -> _Best | None:
        """The best for the i-th, what is already known for it counted; it is taken where there is none."""
        import numpy as np

        if (number := self._texts.get(digest)) is not None:
            return _Best(True, 1.0, -number)
        candidates = sorted({place for value in hashes for place in self._by_hash.get(value, ())})
        if candidates:
            equal = self._sketches[[self.taken[place] for place in candidates]] == self._sketches[i]
            for place, same in zip(candidates, equal, strict=True):
                similarity = float(np.count_nonzero(same)) / same.size
                if similarity >= self._threshold and _share_a_band(same, self._bands, self._rows):
                    one = _Best(False, similarity, -(self._begin + place))
                    best = max(best or one, one)
        if best is None:
            self._texts[digest] = self._begin + len(self.taken)
            for value in hashes:
                self._by_hash.setdefault(value, []).append(len(self.taken))
            self.taken.append(i)
        return best


def mixed(values: "Sketches") -> "Sketches":
    """MurmurHash3's finalizer of 32 bits, which datasketch's scheme "affine32" puts before its permutations."""
    import numpy as np

    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


def _sorted(values: "Sketches") -> "tuple[Sketches, Numbers]":
    """Values in order, and their places; packed into one number each, which numpy sorts several times as fast."""
    import numpy as np

    both = np.sort((values.astype(np.int64) << 32) | np.arange(len(values)))
    return (both >> 32).astype(np.uint32), both & 0xFFFFFFFF


def _alone(hashes: "Sketches") -> "Numbers":
    """Of each row whether no other has any of its values."""
    import numpy as np

    values, places = _sorted(hashes.ravel())
    same = np.zeros(len(values) + 1, bool)  # as the one before
    same[1:-1] = values[1:] == values[:-1]
    shared = np.zeros(len(hashes), bool)
    shared[places[same[:-1] | same[1:]] // hashes.shape[1]] = True
    return ~shared


def _heads(entries: int) -> int:
    """Chains for so many entries: a power of two, one or two entries each."""
    return 1 << ((entries - 1).bit_length() - 1)


def _share_a_band(equal: "Numbers", bands: int, rows: int) -> bool:
    return bool(equal[: bands * rows].reshape(bands, rows).all(axis=1).any())


def _pairs(held: "list[Numbers]") -> "Iterator[tuple[Numbers, Numbers]]":
    """Each of the pairs once, as two columns."""
    import numpy as np

    if held:
        both = np.unique(np.concatenate(held))
        for k in range(0, len(both), COMPARED):
            some = both[k : k + COMPARED]
            yield some >> 32, some & 0xFFFFFFFF
