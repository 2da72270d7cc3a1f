"""From text to token ids and back, through the model's own chat template and never around it."""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from selfimprove.errors import UserError
from selfimprove.recipe import shipped
from selfimprove.records import Message

TEMPLATES = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)


SECONDS = 10.0  # that a chat template may take for prompts that are rendered together


class Codec:
    """A tokenizer's texts and ids, without special tokens of its own: the Rust tokenizer itself where there is one.

    What transformers does around it, each time anew, costs several times the tokenizing.
    """

    def __init__(self, tokenizer: Any) -> None:
        import transformers

        self._tokenizer = tokenizer
        self._rust: Any = None
        if isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
            tokenizer.encode("", add_special_tokens=False)  # sets back truncation and padding that its file may ask for
            self._rust = tokenizer.backend_tokenizer
        self._decodes = self._rust is not None and not tokenizer.clean_up_tokenization_spaces

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts, on all cores unless TOKENIZERS_PARALLELISM says otherwise."""
        if self._rust is None:
            return [list(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        return [encoding.ids for encoding in self._rust.encode_batch_fast(texts, add_special_tokens=False)]

    def decode_many(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The texts of ids, special tokens left out; on as many cores."""
        if self._decodes:
            return list(self._rust.decode_batch(sequences, skip_special_tokens=True))
        return [str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in sequences]


class Chat:
    """The tokenizer of a model directory, seen through its chat template.

    Raises:
        UserError: no tokenizer, no chat template, or no end token.
    """

    def __init__(self, model: Path) -> None:
        import transformers

        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"model {model} has no tokenizer that loads: {first}", _SAVE_TOKENIZER) from None
        if not self.tokenizer.chat_template:
            raise UserError(
                f"model {model} has no chat template",
                "use the instruct version of the model, or save one in tokenizer_config.json (key chat_template)",
            )
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"model {model} has no end token (eos_token)", _SAVE_TOKENIZER)
        self.stop_token_ids = _end_tokens(model, int(self.tokenizer.eos_token_id))
        self._codec = Codec(self.tokenizer)
        begins, ends = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self._bos = None if begins == ends else begins
        self._control = _control_strings(self.tokenizer)
        self._controls = re.compile("|".join(map(re.escape, self._control))) if self._control else None

    def prompt_ids(self, text: str, earlier: Sequence[Message] = ()) -> list[int]:
        """Token ids of a user turn up to where the assistant begins, after the turns before it.

        There is exactly one BOS where the model has one.
        """
        return self.prompt_ids_of([(text, earlier)])[0]

    def prompt_ids_of(self, prompts: Iterable[tuple[str, Sequence[Message]]]) -> list[list[int]]:
        """The same of many, tokenized together: (user turn, the turns before it)."""
        dialogues = [[*earlier, Message(role="user", content=text)] for text, earlier in prompts]
        return self._encoded(self._rendered(dialogues, add_generation_prompt=True))

    def completion_ids(self, prompt: str, completion: str) -> list[int]:
        """Token ids of the assistant's turn, end token included, as they continue `prompt_ids(prompt)`.

        Raises:
            UserError: the template does not render the prompt as a prefix of prompt + completion.
        """
        before = self.prompt_ids(prompt)
        turns = [Message(role="user", content=prompt), Message(role="assistant", content=completion)]
        [whole] = self._encoded(self._rendered([turns], add_generation_prompt=False))
        if whole[: len(before)] != before:
            raise UserError(
                f"the chat template does not render a prompt as a prefix of prompt and answer: {prompt!r}",
                "use a template that adds nothing to earlier turns (the training variant of the model's template)",
            )
        rest = whole[len(before) :]
        ends = [i for i, token in enumerate(rest) if token in self.stop_token_ids]
        return rest[: ends[-1] + 1] if ends else [*rest, self.stop_token_ids[0]]

    def text(self, token_ids: list[int]) -> str:
        """The text of a completion, without special tokens and surrounding white space."""
        return self.texts([token_ids])[0]

    def texts(self, sequences: Sequence[list[int]]) -> list[str]:
        """The same of many completions."""
        return [text.strip() for text in self._codec.decode_many(sequences)]

    def _rendered(self, dialogues: Sequence[list[Message]], *, add_generation_prompt: bool) -> list[list[str]]:
        """What the template makes of dialogues, each in the pieces that are to be encoded."""
        if not dialogues:
            return []
        marked = [self._masked(turns) for turns in dialogues]
        try:
            with _at_most(SECONDS):
                if isinstance(self.tokenizer.chat_template, str):
                    _globals_to_dict(self.tokenizer.chat_template)
                texts: list[str] = self.tokenizer.apply_chat_template(
                    [masked for _, masked in marked], add_generation_prompt=add_generation_prompt, tokenize=False
                )
        except _TooLong:
            raise UserError(
                f"the model's chat template does not end within {SECONDS:g} s", "mend chat_template of the model"
            ) from None
        except (jinja2.TemplateError, MemoryError, RecursionError) as error:
            raise UserError(f"the model's chat template fails: {error}", "mend chat_template of the model") from None
        return [self._pieces(text, mark) for text, (mark, _) in zip(texts, marked, strict=True)]

    def _pieces(self, text: str, mark: str) -> list[str]:
        """A rendered text, the control strings that somebody wrote in it taken apart."""
        return [
            part
            for k, piece in enumerate(text.split(mark) if mark else [text])
            for part in (_halves(self._control[int(piece)]) if k % 2 else [piece])
        ]

    def _encoded(self, dialogues: Sequence[list[str]]) -> list[list[int]]:
        """The ids of dialogues that are given in pieces."""
        pieces = iter(self._codec.encode_many([piece for pieces in dialogues for piece in pieces]))
        found = [
            next(pieces) if len(dialogue) == 1 else [token for _ in dialogue for token in next(pieces)]
            for dialogue in dialogues
        ]
        bos = self._bos
        if bos is not None and any(ids.count(bos) > 1 for ids in found):
            raise UserError("the chat template adds a second BOS token", "remove one from the template or tokenizer")
        return found

    def _masked(self, turns: list[Message]) -> tuple[str, list[Message]]:
        """Turns in which each control string is its number between two marks, and the mark; none where there is none.

        What a user or a model has written is never read as the template's own control tokens.
        """
        if self._controls is None or not any(self._controls.search(turn["content"]) for turn in turns):
            return "", turns
        written = "".join(turn["content"] for turn in turns)
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in written)  # private use
        numbers = {string: str(i) for i, string in enumerate(self._control)}
        masked = [
            Message(
                role=turn["role"],
                content=self._controls.sub(lambda m: f"{mark}{numbers[m[0]]}{mark}", turn["content"]),
            )
            for turn in turns
        ]
        return mark, masked


def _control_strings(tokenizer: Any) -> list[str]:
    """The strings that the tokenizer or its chat template take for control tokens, longest first."""
    template = str(tokenizer.chat_template)
    known = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    found = [string for string, special in known.items() if len(string) > 1 and (special or string in template)]
    return sorted(found, key=len, reverse=True)


def _halves(control: str) -> list[str]:
    """A control string in two parts, neither of which is one: encoded apart, they are ordinary tokens."""
    return [control[:1], control[1:]]


@cache
def _globals_to_dict(template: str) -> None:
    """Each rendering copies a template's globals; as the ChainMap that jinja2 makes of them that is half of its time.

    transformers keeps what it has compiled, and has no public way to it; where there is none, nothing is changed.
    """
    from transformers.utils import chat_template_utils

    if compile_once := getattr(chat_template_utils, "_compile_jinja_template", None):
        compiled = compile_once(template)
        compiled.globals = dict(compiled.globals)


_SAVE_TOKENIZER = "save the tokenizer beside the weights: tokenizer.save_pretrained(DIRECTORY)"


def _end_tokens(model: Path, eos: int) -> list[int]:
    """The tokenizer's end token, then those that the model's generation config adds."""
    import transformers

    try:
        more = transformers.GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        more = None
    listed = more if isinstance(more, list) else [] if more is None else [more]
    return [eos, *(token for token in listed if token != eos)]


class _TooLong(BaseException):
    """A template's time is over; no `except Exception` on the way may take it."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """End what runs longer, in the main thread; elsewhere Python has no such means.

    A timer that somebody else has set goes on afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: Any) -> None:
        raise _TooLong

    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, over)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)), interval)


def template_path(name: str) -> Path:
    """The file of a shipped prompt template.

    Raises:
        UserError: the name leads out of the folder of templates.
    """
    if not re.fullmatch(r"\w[\w-]*(/\w[\w-]*)*", name):
        raise UserError(f"'{name}' cannot be a template's name", "a file of prompts/ without .jinja")
    return shipped("prompts") / f"{name}.jinja"


@cache
def _template(name: str) -> tuple[jinja2.Template, frozenset[str]]:
    """A shipped template and the variables that it uses."""
    source = template_path(name).read_text(encoding="utf-8").strip()
    try:
        used = jinja2.meta.find_undeclared_variables(TEMPLATES.parse(source))
        template = TEMPLATES.from_string(source)
        template.globals = dict(template.globals)  # each rendering copies them, and a ChainMap takes its time
        return template, frozenset(used)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"prompts/{name}.jinja, line {error.lineno}: {error.message}", "mend the template") from None


def render(name: str, values: Mapping[str, Any]) -> str:
    """A prompt template filled in.

    Raises:
        UserError: the template does not use exactly these variables, or is no template.
    """
    template, used = _template(name)
    if used != values.keys():
        unknown, unused = sorted(used - values.keys()), sorted(values.keys() - used)
        wrong = f"uses {unknown[0]}, which is not given" if unknown else f"does not use {unused[0]}"
        raise UserError(f"prompts/{name}.jinja {wrong}", f"its variables are {', '.join(sorted(values))}")
    return template.render(**values)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def tagged(text: str, tag: str) -> str | None:
    """What stands in the first <tag> ... </tag>; None where there is none."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return found[1].strip() if found else None
