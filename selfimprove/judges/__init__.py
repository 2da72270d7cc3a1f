"""Judges by name. A judge scores completions one by one, or compares them two by two; `protocol.py` says what it is."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove.errors import UserError
from selfimprove.judges import verifiers
from selfimprove.judges.controls import length, random
from selfimprove.judges.demo_rubric import demo_rubric
from selfimprove.judges.pairwise import pairwise, pairwise_ranker
from selfimprove.judges.protocol import SERVER, Candidate, Comparer, Judge, Opinion, Panel, Preference, candidate
from selfimprove.judges.rubric import rubric
from selfimprove.judges.scorers import logps, reward_model
from selfimprove.judges.verifiers import verifier
from selfimprove.judges.votes import discriminator, ensemble, self_consistency
from selfimprove.recipe import Choice

__all__ = [
    "COMPARERS", "JUDGES", "Candidate", "Comparer", "Judge", "Opinion", "Panel", "Preference",
    "asked", "bind", "bind_comparer", "candidate", "check", "compares", "everyone", "files", "fixed", "identity",
    "models", "moves", "needs_answer", "templates", "works_elsewhere",
]  # fmt: skip


class Spec(NamedTuple):
    """A judge, and whether its score is of prompt and answer alone: the same in every round and for every policy.

    `check` looks at parameters together, where their types alone say too little.
    """

    function: Callable[..., list[Opinion]]
    fixed: bool = False
    check: Callable[..., object] | None = None


JUDGES: Mapping[str, Spec] = {
    "verifier": Spec(verifier, fixed=True, check=verifiers.prepared),
    "rubric": Spec(rubric),
    "reward_model": Spec(reward_model, fixed=True),
    "logps": Spec(logps),
    "self_consistency": Spec(self_consistency),
    "discriminator": Spec(discriminator),
    "ensemble": Spec(ensemble),
    "length": Spec(length, fixed=True),
    "random": Spec(random),
    "demo_rubric": Spec(demo_rubric, fixed=True),
}
COMPARERS: Mapping[str, Callable[..., list[Preference]]] = {"pairwise": pairwise, "pairwise_ranker": pairwise_ranker}


def compares(choice: Choice) -> bool:
    """Whether a judge looks at two answers at a time."""
    return choice.name in COMPARERS


def bind(choice: Choice) -> Judge:
    """The judge of single answers that a recipe names, its parameters bound.

    Raises:
        UserError: unknown name or parameter, parameters that do not go together, or a judge that compares.
    """
    if compares(choice):
        known = ", ".join(sorted(JUDGES))
        raise UserError(f"judge '{choice.name}' compares two answers, and here each needs a score", f"known: {known}")
    bound: Judge = choice.bind("judge", {name: spec.function for name, spec in JUDGES.items()})
    if check := JUDGES[choice.name].check:
        check(**bound.keywords)  # type: ignore[attr-defined]  # Choice.bind returns a partial
    for member in members(choice):
        bind(member)
    return bound


def bind_comparer(choice: Choice) -> Comparer:
    """The judge of two answers that a recipe names, its parameters bound.

    Raises:
        UserError: unknown name or parameter.
    """
    return choice.bind("judge", COMPARERS)


def check(choice: Choice) -> None:
    """Whether a recipe's judge, of either kind, is one.

    Raises:
        UserError: unknown name or parameter.
    """
    if compares(choice):
        bind_comparer(choice)
    else:
        bind(choice)


def members(choice: Choice) -> list[Choice]:
    """The judges of an ensemble; none of another judge."""
    given = (choice.model_extra or {}).get("judges", []) if choice.name == "ensemble" else []
    return [Choice.model_validate(one) for one in given]


def fixed(choice: Choice) -> bool:
    """Whether a score is of prompt and answer alone, so that it can be kept over rounds."""
    if choice.name == "ensemble":
        return False  # ranks are among a prompt's answers
    return choice.name in JUDGES and JUDGES[choice.name].fixed


def models(choice: Choice) -> list[str]:
    """The models that a judge asks, as the recipe names them."""
    if of := members(choice):
        return list(dict.fromkeys(name for member in of for name in models(member)))
    given = (choice.model_extra or {}).get("model")
    if isinstance(given, str):
        return [given]
    return ["current"] if choice.name in ("rubric", "pairwise", "logps") else []


class Asked(NamedTuple):
    """The models that judges ask: local ones as the recipe names them, and servers by their names."""

    models: list[str]
    servers: list[str]


def everyone(choices: Iterable[Choice | None]) -> list[Choice]:
    """The judges that are there, and the members of ensembles."""
    return [one for choice in choices if choice for one in (choice, *members(choice))]


def asked(choices: Iterable[Choice | None], more: Iterable[str] = ()) -> Asked:
    """What judges ask, and `more` that is asked besides, each once."""
    names = list(dict.fromkeys([*(name for one in everyone(choices) for name in models(one)), *more]))
    local = [name for name in names if not name.startswith(SERVER)]
    return Asked(local, [name.removeprefix(SERVER) for name in names if name.startswith(SERVER)])


def moves(choice: Choice) -> bool:
    """Whether a judge is another one in another round: what it says of two rounds cannot be compared."""
    return any(
        one.name in ("self_consistency", "discriminator") or "current" in models(one) for one in everyone([choice])
    )


def works_elsewhere(choice: Choice) -> bool:
    """Whether a judge is long about it, and works elsewhere than on the devices of the run's own models.

    That is one that asks servers, or runs programs in the sandbox. A user's function may want this process to itself.
    """
    checkers = [(one.model_extra or {}).get("checker") for one in everyone([choice]) if one.name == "verifier"]
    found = asked([choice])
    return not found.models and "python" not in checkers and (bool(found.servers) or "unit_tests" in checkers)


def templates(choice: Choice) -> list[str]:
    """The prompt templates that a judge reads, those of an ensemble's members too."""
    found = []
    for one in everyone([choice]):
        given = one.model_extra or {}
        if one.name == "rubric":
            found.append(f"judge/{given.get('template', 'hundred')}")
        if one.name == "pairwise":
            found.append("judge/pairwise_label" if given.get("read") == "logprobs" else "judge/pairwise")
    return found


def files(choice: Choice) -> dict[str, Path]:
    """The files outside the recipe on whose content a judge's verdicts depend, by the name the recipe gives them."""
    if choice.name == "verifier":
        return verifiers.files(**(choice.model_extra or {}))
    return {name: path for member in members(choice) for name, path in files(member).items()}


def needs_answer(choice: Choice) -> bool:
    """Whether a judge knows nothing where there is no reference answer."""
    return choice.name == "verifier" and verifiers.needs_answer(**(choice.model_extra or {}))


def identity(choice: Choice | None) -> str:
    """A judge's name and parameters, as verdicts carry them."""
    if choice is None:
        return "none"
    given: Mapping[str, Any] = choice.model_extra or {}
    told = ", ".join(f"{name}={value}" for name, value in sorted(given.items()))
    return f"{choice.name}({told})" if told else choice.name
