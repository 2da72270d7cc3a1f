"""IFEval's 25 checks. Each takes time linear in the text, since a hostile answer may be long."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Literal

from selfimprove.constraints import language

Relation = Literal["at least", "less than"]
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
FENCES = ("```json", "```Json", "```JSON", "```")


def _compare(found: int, relation: Relation, wanted: int) -> bool:
    return found >= wanted if relation == "at least" else found < wanted


def _contains(keyword: str, text: str) -> bool:
    return re.search(re.escape(keyword), text, re.IGNORECASE) is not None


def _keywords(text: str, *, keywords: list[str]) -> bool:
    return all(_contains(keyword, text) for keyword in keywords)


def _keyword_frequency(text: str, *, keyword: str, frequency: int, relation: Relation) -> bool:
    """Also within other words."""
    return _compare(len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE)), relation, frequency)


def _forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    """Whole words only."""
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    return _compare(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _language(text: str, *, language: str) -> bool:
    return _is_in(text, language)


def _is_in(text: str, wanted: str) -> bool:
    found = language.detect(text)
    return found is None or found == wanted  # what has no language is held against nobody


def _sentences(text: str, *, num_sentences: int, relation: Relation) -> bool:
    return _compare(language.sentences(text), relation, num_sentences)


def _words(text: str, *, num_words: int, relation: Relation) -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def _paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Parted by ***; an empty one counts only as an error in the middle."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if not all(part.strip() for part in parts[1:-1]):
        return False
    return sum(1 for part in parts if part.strip()) == num_paragraphs


def _nth_paragraph(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Parted by an empty line; empty ones are not counted, but do take a place."""
    parts = text.split("\n\n")
    count = sum(1 for part in parts if part.strip())
    if not 1 <= nth_paragraph <= count or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _placeholders(text: str, *, num_placeholders: int) -> bool:
    """[Words] in brackets on one line."""
    count = 0
    for line in text.split("\n"):
        end = -1
        while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start)) >= 0:
            count += 1
    return count >= num_placeholders


def _postscript(text: str, *, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, re.escape(marker.lower()))
    return re.search(pattern, text.lower()) is not None


def _bullets(text: str, *, num_bullets: int) -> bool:
    """Lines that begin with a dash, or with a single asterisk."""
    stars = re.findall(r"^[^\S\n]*+\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*+-", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def _constrained(text: str) -> bool:
    return any(option in text for option in OPTIONS)


def _highlights(text: str, *, num_highlights: int) -> bool:
    """*Single* and **double** ones; a double one counts in both, where anything stands between."""
    single = [found for found in re.findall(r"\*[^\n*]*\*", text) if found.strip("*").strip()]
    double = [found for found in re.findall(r"\*\*[^\n*]*\*\*", text) if found[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def _sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def _json(text: str) -> bool:
    inner = text.strip()
    for fence in FENCES:
        inner = inner.removeprefix(fence)
    try:
        json.loads(inner.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    """<<Words>> in double angular brackets on one line."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and end > start + 2 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


def _two_responses(text: str) -> bool:
    """Two different ones, parted by ******."""
    parts = [part.strip() for part in text.split("******")]
    found = [part for part in parts if part]
    return all(parts[1:-1]) and len(found) == 2 and found[0] != found[1]


def _repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    inner = text.strip()
    return len(inner) > 1 and inner[0] == inner[-1] == '"'


def _capital_words(text: str, *, capital_frequency: int, capital_relation: Relation) -> bool:
    capital = sum(1 for word in language.words(text) if word.isupper())
    return _compare(capital, capital_relation, capital_frequency)


def _upper(text: str) -> bool:
    return text.isupper() and _is_in(text, "en")


def _lower(text: str) -> bool:
    return text.islower() and _is_in(text, "en")


def _no_comma(text: str) -> bool:
    return "," not in text


CHECKS: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _upper,
    "change_case:english_lowercase": _lower,
    "punctuation:no_comma": _no_comma,
}
