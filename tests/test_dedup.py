"""Near duplicates against a brute-force Jaccard; overlap with the evaluation set against a plain search in words."""

import random

import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st

from selfimprove import data, dedup, sketches
from selfimprove.demo import world


class OneByOne:
    """datasketch as it is meant to be used, a prompt at a time: what `Seen` must say too."""

    def __init__(self, max_similarity: float) -> None:
        self.max_similarity = max_similarity
        self.near = MinHashLSH(num_perm=dedup.PERMUTATIONS, params=dedup.bands(max_similarity))
        self.sketches: list[MinHash] = []
        self.origins: list[str] = []
        self.exact: dict[str, int] = {}

    def sketch(self, text: str) -> MinHash:
        sketch = MinHash(num_perm=dedup.PERMUTATIONS, seed=dedup.SEED, scheme="affine32")
        sketch.update_batch([shingle.encode() for shingle in dedup.shingles(text)])
        return sketch

    def add(self, text: str, origin: str) -> None:
        self.near.insert(len(self.sketches), self.sketch(text))
        self.exact.setdefault(data.fold(text), len(self.sketches))
        self.sketches.append(self.sketch(text))
        self.origins.append(origin)

    def admit(self, text: str, origin: str) -> str | None:
        if (number := self.exact.get(data.fold(text))) is not None:
            return f"duplicate {self.origins[number]}"
        sketch = self.sketch(text)
        found = ((sketch.jaccard(self.sketches[n]), -n) for n in self.near.query(sketch))
        similarity, number = max(found, default=(0.0, 0))
        if similarity >= self.max_similarity:
            return f"near duplicate {self.origins[-number]}"
        self.add(text, origin)
        return None


def alike(rng: random.Random) -> list[str]:
    """Prompts of the demo world's few templates, short ones with hardly a word, and edits of a few long ones."""
    texts = [world.draw(rng).prompt for _ in range(300)]
    texts += [" ".join(rng.choices(WORDS, k=rng.randrange(0, 9))) for _ in range(150)]
    long = [random.Random(k).choices(WORDS, k=40) for k in range(3)]
    for _ in range(350):
        words = list(rng.choice(long))
        for _ in range(rng.randrange(0, 6)):
            words[rng.randrange(40)] = rng.choice(WORDS)
        texts.append(" ".join(words))
    rng.shuffle(texts)
    return texts


@pytest.mark.parametrize("batch", [1, 7, 1024])
@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 1.0])
def test_many_at_once_are_judged_as_one_by_one(similarity, batch, monkeypatch, tmp_path):
    """With room for few, so that the index grows; the file of sketches leaves nothing behind."""
    monkeypatch.setattr(dedup, "BATCH", batch)
    monkeypatch.setattr(sketches, "FIRST", 16)
    monkeypatch.setattr(sketches, "COMPARED", 50)
    rng = random.Random(similarity)
    seeds, earlier, texts = alike(rng)[:60], alike(rng)[:60], alike(rng)
    one, many = OneByOne(similarity), dedup.Seen(similarity, tmp_path)
    for known, origin in ((seeds, "of a seed"), (earlier, "of an earlier round")):
        for text in known:
            one.add(text, origin)
        many.add(known, origin)
    expected = [one.admit(text, "within the round") for text in texts]
    assert many.admit(texts, "within the round") == expected
    assert {None, "duplicate of a seed", "duplicate within the round"} <= set(expected)
    assert (similarity == 1.0) != any(reason.startswith("near") for reason in expected if reason)
    assert not list(tmp_path.iterdir())


WORDS = [f"w{i}" for i in range(40)]
texts = st.lists(st.sampled_from(WORDS[:6]), max_size=9).map(" ".join)


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} or {tuple(words)}


def jaccard(a: str, b: str) -> float:
    return len(trigrams(a) & trigrams(b)) / len(trigrams(a) | trigrams(b))


def test_near_duplicates_are_those_of_brute_force_but_at_the_threshold():
    """Four standard deviations of the estimate around the threshold are left to chance."""
    rng = random.Random(0)
    wrong, near, far = [], 0, 0
    for _ in range(300):
        words = rng.choices(WORDS, k=rng.randrange(20, 90))
        other = list(words)
        for _ in range(rng.randrange(1, 5)):
            other[rng.randrange(len(words))] = rng.choice(WORDS)
        text, edited = " ".join(words), " ".join(other)
        truth = jaccard(text, edited)
        if text == edited or abs(truth - 0.8) < 4 * (0.8 * 0.2 / dedup.PERMUTATIONS) ** 0.5:
            continue
        near, far = near + (truth > 0.8), far + (truth < 0.8)
        seen = dedup.Seen(0.8)
        seen.add([text], "of a seed")
        if (seen.admit([edited], "") == ["near duplicate of a seed"]) != (truth > 0.8):
            wrong.append((truth, text, edited))
    assert not wrong
    assert min(near, far) >= 30


def test_the_estimate_is_exact_where_two_prompts_have_the_same_trigrams():
    seen = dedup.Seen(1.0)
    seen.add(["a b c a b c a"], "of a seed")
    assert seen.admit(["b c a b c a b c"], "") == ["near duplicate of a seed"]  # other words, the same trigrams
    assert seen.admit(["b c a b c a d"], "") == [None]


@pytest.mark.parametrize("similarity", [0.1, 0.5, 0.8, 0.95, 1.0])
def test_the_hashing_shows_a_pair_of_the_threshold_nearly_always(similarity):
    bands, rows = dedup.bands(similarity)
    assert bands * rows <= dedup.PERMUTATIONS
    assert bands >= 2
    assert 1 - (1 - similarity**rows) ** bands >= dedup.RECALL


def test_the_reason_names_the_most_similar_prompt_and_exact_comes_before_near():
    seed = " ".join(WORDS[:30])
    earlier = f"{seed} more words"
    seen = dedup.Seen(0.7)
    seen.add([seed], "of a seed")
    seen.add([earlier], "of an earlier round")
    new = [
        seed.upper() + "!",
        f"{seed} more words still",
        f"{seed} else",
        "something else entirely",
        "Something else, entirely",
    ]
    assert seen.admit(new, "within the round") == [
        "duplicate of a seed",
        "near duplicate of an earlier round",
        "near duplicate of a seed",
        None,
        "duplicate within the round",
    ]


def test_short_prompts_are_near_duplicates_of_nothing_but_themselves():
    seen = dedup.Seen(0.8)
    seen.add(["sort fox"], "of a seed")
    assert seen.admit(["Sort: fox.", "sort fox pen", "fox sort"], "") == ["duplicate of a seed", None, None]


@settings(max_examples=100, deadline=None)
@given(st.lists(texts, max_size=4), texts, st.integers(1, 5))
def test_overlap_is_that_of_a_search_in_the_words(heldout, prompt, n):
    def spaced(words: list[str]) -> str:
        return f" {' '.join(words)} "

    expected = None
    for words in map(str.split, heldout):
        if words == prompt.split():
            expected = "in the evaluation set"
            break
        pieces = [words[i : i + n] for i in range(max(1, len(words) - n + 1))] if words else []
        if any(spaced(piece) in spaced(prompt.split()) for piece in pieces):
            expected = "overlaps the evaluation set"
    assert dedup.HeldOut(heldout, n).reason(prompt) == expected


def test_thirteen_words_in_a_row_are_too_many_and_twelve_are_not():
    heldout = dedup.HeldOut([" ".join(WORDS[:20])], 13)
    assert heldout.reason("please " + " ".join(WORDS[2:15]) + " now") == "overlaps the evaluation set"
    assert heldout.reason("please " + " ".join(WORDS[2:14]) + " now") is None


def test_the_same_prompts_are_judged_alike_in_every_process():
    """The sketch's first values, so that another release of the library that hashes otherwise is noticed."""
    [sketch] = dedup.Seen(0.8)._sketch(["put this list in alphabetical order"])
    assert sketch.tolist()[:3] == [479789291, 357278147, 2778648499]
    assert dedup.shingles("Put, this list") == {data.fold("put this list")}
