"""Diversity against NLTK, against every subset and every pair written out, and what it must not depend on."""

import itertools
import random
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from selfimprove.evaluation import diversity

WORDS = [f"w{k}" for k in range(400)]
TEXTS = st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=9), min_size=2, max_size=7)


def written(number: int, words: int = 30, vocabulary: int = 400, seed: int = 0) -> list[str]:
    """Texts of random words; a smaller vocabulary is less diverse."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS[:vocabulary], k=words)) for _ in range(number)]


@given(TEXTS)
def test_self_bleu_is_nltks_mean_over_the_texts(texts):
    smoothing = SmoothingFunction().method1
    expected = [
        sentence_bleu(texts[:i] + texts[i + 1 :], text, smoothing_function=smoothing, auto_reweigh=True)
        for i, text in enumerate(texts)
    ]
    assert diversity.self_bleu(texts) == pytest.approx(sum(expected) / len(texts), abs=1e-12)


def test_self_bleu_of_the_same_texts_is_one_and_of_texts_that_share_no_word_zero():
    assert diversity.self_bleu([["a", "b", "c", "d"]] * 3) == pytest.approx(1)
    assert diversity.self_bleu([["a"]] * 3) == pytest.approx(1)
    assert diversity.self_bleu([["a", "b"], ["c", "d"]]) == 0
    assert diversity.self_bleu([["a", "b"]]) is None


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), st.data())
def test_distinct_is_the_mean_over_every_sample_of_that_size(words, data):
    size = data.draw(st.integers(1, len(words)))
    samples = list(itertools.combinations(words, size))
    expected = sum(len(set(sample)) for sample in samples) / len(samples) / size
    assert diversity.distinct([" ".join(words)], n=1, size=size) == pytest.approx(expected, abs=1e-9)


def test_distinct_of_all_is_the_plain_distinct_n():
    assert diversity.distinct(["a b a b", "a b c"], n=2) == 3 / 5
    assert diversity.distinct(["a b a b", "a b c"], n=1) == 3 / 7
    assert diversity.distinct(["a"], n=2) is None
    assert diversity.distinct(["a b c"], n=2, size=3) is None


def test_a_longer_collection_of_the_same_kind_is_not_less_diverse():
    few, many = written(60), written(600, seed=1)
    plain = [diversity.distinct(texts) for texts in (few, many)]
    assert plain[0] > plain[1] * 1.02  # what the number of words alone does
    one, other = diversity.compare([few, many])
    assert one.distinct == pytest.approx(other.distinct, rel=0.01)
    assert one.self_bleu == pytest.approx(other.self_bleu, abs=0.02)
    assert one.compression == pytest.approx(other.compression, rel=0.02)


def test_texts_of_a_smaller_vocabulary_are_less_diverse_by_every_measure():
    rich, poor = diversity.compare([written(200), written(200, vocabulary=20)])
    assert poor.distinct < 0.5 * rich.distinct
    assert poor.self_bleu > rich.self_bleu + 0.1
    assert poor.compression > 1.2 * rich.compression


def test_a_collection_with_hardly_a_word_is_unknown_and_leaves_the_others_alone():
    rich, silent, none = diversity.compare([written(200), ["", "yes", ""], []])
    alone = diversity.compare([written(200)])[0]
    assert rich.distinct == alone.distinct
    assert silent.distinct is None
    assert (none.texts, none.distinct, none.self_bleu, none.compression, none.repetition) == (0, None, None, None, None)


def test_compression_and_repetition_are_what_zlib_and_counting_say():
    data = b"the same again " * 50
    assert diversity.compression(data) == len(data) / len(zlib.compress(data))
    assert diversity.compression(b"") is None
    assert diversity.repeated(["a b c d a b c d", "a b"]) == pytest.approx(0.1)
    assert diversity.repeated([]) is None


def test_the_mean_cosine_is_that_of_every_pair():
    vectors = np.random.default_rng(0).normal(size=(40, 8)) + 0.3
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(40) for j in range(i)]
    assert diversity.mean_cosine(vectors) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert diversity.mean_cosine(vectors.astype(np.float32)) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert diversity.mean_cosine(vectors[:1]) is None
    with pytest.raises(ValueError, match="length zero"):
        diversity.mean_cosine(np.zeros((2, 3)))


def test_a_hundred_thousand_texts_take_seconds_and_the_cosine_no_matrix_of_pairs():
    texts = written(1000) * 100
    began = time.perf_counter()
    assert diversity.distinct(texts) < 0.01
    assert time.perf_counter() - began < 15  # about 2 s on a free core
    vectors = np.random.default_rng(0).normal(size=(100_000, 32)).astype(np.float32)
    tracemalloc.start()
    assert abs(diversity.mean_cosine(vectors)) < 0.01
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
