"""Text that a model wrote, made safe to show: every control character is named instead of obeyed, long text is cut.

Terminal escape codes, bidirectional overrides, zero-width and tag characters change how the text around them looks.
Here each becomes a visible sign, `‹ESC›` or `‹RLO›`; what is markup to HTML stays text.
"""

import functools
import json
import unicodedata
from typing import Any

from markupsafe import Markup, escape

LONGEST = 4_000  # characters of one text; what is left out is counted and said
HIDDEN = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})  # controls, formats, private use, surrogates, separators
ORTHOGRAPHY = "\u200c\u200d"  # the joiners: Persian, the Indic scripts and emoji are not right without them
C0 = (
    "NUL", "SOH", "STX", "ETX", "EOT", "ENQ", "ACK", "BEL", "BS", "HT", "LF", "VT", "FF", "CR", "SO", "SI",
    "DLE", "DC1", "DC2", "DC3", "DC4", "NAK", "SYN", "ETB", "CAN", "EM", "SUB", "ESC", "FS", "GS", "RS", "US",
)  # fmt: skip
SHORT = dict(enumerate(C0)) | {
    0x7F: "DEL", 0x9B: "CSI",
    0x061C: "ALM", 0x200E: "LRM", 0x200F: "RLM", 0x202A: "LRE", 0x202B: "RLE", 0x202C: "PDF", 0x202D: "LRO",
    0x202E: "RLO", 0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI", 0x200B: "ZWSP", 0x2060: "WJ",
    0xFEFF: "BOM", 0x00AD: "SHY", 0x2028: "LS", 0x2029: "PS",
}  # fmt: skip


def visible(text: str, keep: str = "\n\t", longest: int = LONGEST) -> str:
    """The text with a sign for every control character, cut to its first `longest` characters with the rest counted.

    Args:
        text: whatever a model, a server or a file said.
        keep: control characters that stay.
        longest: characters shown.
    """
    shown = text[:longest].translate(_names(keep))
    return f"{shown} … {left_out(text, longest)}" if len(text) > longest else shown


def line(text: str, longest: int = LONGEST) -> str:
    """`visible` on one line: for terminals and table cells."""
    return visible(text, "", longest)


def as_json(value: Any) -> str:
    """JSON to read: every character as it is but those that would act on a terminal."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return text.translate(_ESCAPED)


def json_line(value: Any) -> str:
    """JSON on one line, for a stream of rows; what is no number becomes null."""
    import msgspec

    return msgspec.json.encode(value).decode().translate(_ESCAPED)


def markup(text: str) -> Markup:
    """The text as HTML, whole: escaped, and every sign for a control character marked as not the text's own."""
    return Markup(str(escape(text)).translate(_MARKED))


def left_out(text: str, longest: int = LONGEST) -> str:
    """`(1,234 more characters)`; empty where nothing is left out."""
    more = len(text) - longest
    return f"({more:,} more character{'s' if more > 1 else ''})" if more > 0 else ""


def name(character: str) -> str:
    """`‹ESC›`, `‹RLO›`, `‹U+E0041›`; no control pictures (U+2400 on), which many fonts lack."""
    return f"‹{SHORT.get(ord(character), f'U+{ord(character):04X}')}›"


class _Names(dict[int, Any]):
    """A table for str.translate, filled as characters are met."""

    def __init__(self, keep: str) -> None:
        self._keep = keep + ORTHOGRAPHY

    def __missing__(self, code: int) -> str:
        character = chr(code)
        hidden = unicodedata.category(character) in HIDDEN and character not in self._keep
        self[code] = self.sign(character) if hidden else character
        return str(self[code])

    def sign(self, character: str) -> str:
        return name(character)


class _Marked(_Names):
    def sign(self, character: str) -> str:
        return f'<span class="sign">{name(character)}</span>'


class _Escaped(_Names):
    def sign(self, character: str) -> str:
        return json.dumps(character)[1:-1]


@functools.cache
def _names(keep: str) -> _Names:
    return _Names(keep)


_MARKED = _Marked("\n\t")
_ESCAPED = _Escaped("\n\t")
