"""Sentences, words and language of a text, by the libraries that IFEval uses."""

import functools
from typing import Any

from selfimprove.errors import UserError

INSTALL = "pip install 'selfimprove[ifeval]'"
PUNKT = "python -m nltk.downloader punkt_tab, or set NLTK_DATA to a folder that holds tokenizers/punkt_tab"


def check() -> None:
    """Look whether the libraries and the model are here.

    Raises:
        UserError: one is not, with what installs it.
    """
    detect("")
    _punkt()


def detect(text: str) -> str | None:
    """The ISO 639-1 code of a text's language by langdetect, the same at every call; None where it finds none.

    Raises:
        UserError: langdetect is not installed.
    """
    try:
        import langdetect
    except ImportError:
        raise UserError("IFEval's language checks need langdetect", INSTALL) from None
    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None


def sentences(text: str) -> int:
    """How many sentences NLTK's English Punkt model sees.

    Raises:
        UserError: NLTK or its model is not installed.
    """
    return len(_punkt().tokenize(text))


def words(text: str) -> list[str]:
    """The words of all sentences by NLTK's tokenizer in the manner of the Penn treebank.

    Raises:
        UserError: NLTK or its model is not installed.
    """
    return [word for sentence in _punkt().tokenize(text) for word in _treebank().tokenize(sentence)]


@functools.cache
def _punkt() -> Any:
    try:
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError:
        raise UserError("IFEval's sentence checks need nltk", INSTALL) from None
    try:
        return PunktTokenizer("english")
    except LookupError:
        raise UserError("IFEval's sentence checks need NLTK's Punkt model, which is not here", PUNKT) from None


@functools.cache
def _treebank() -> Any:
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer()
