"""A judge held against pairs that people have labelled: asked now, or from its recorded verdicts."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from selfimprove import judges
from selfimprove.chat import Chat
from selfimprove.errors import UserError
from selfimprove.execution import Executors
from selfimprove.judges import Candidate, Opinion, Panel, audit, audit_scores
from selfimprove.judges.audit import PairAudit, Row
from selfimprove.judges.audit_scores import ScoreAudit, Scored
from selfimprove.judges.labelled import LabelledPair, RecordedVerdict
from selfimprove.judges.panel import RUN, Models
from selfimprove.judges.protocol import SERVER
from selfimprove.models import locate_model
from selfimprove.recipe import Choice, Recipe
from selfimprove.store import model_identity, row_seed

READS_TOKENS = frozenset({"length", "logps"})  # judges that look at an answer's token ids
Encode = Callable[[str], list[int]]  # an answer's token ids under the policy


class Audited(NamedTuple):
    """What was found of a judge that was asked."""

    judge: str
    pairs: PairAudit
    scores: ScoreAudit | None  # of a judge of single answers
    reasons: dict[str, int]  # why verdicts are unknown


class Group(NamedTuple):
    """What was found of recorded verdicts, one judge, strategy and subset at a time."""

    subset: str
    judge: str
    strategy: str
    pairs: PairAudit


class Recorded(NamedTuple):
    """All groups of a file of verdicts, and the subsets in it that no data was given for."""

    groups: list[Group]
    left_out: list[str]


@contextmanager
def open_panel(recipe: Recipe, progress: Callable[[str, int, int], None]) -> Iterator[tuple[Panel, Encode]]:
    """The models that the recipe's label judge asks, and its policy's tokenizer.

    "current" and "initial" are both the recipe's model. Replies of local models are kept in a folder that goes with
    the call, those of servers in `runs/audit`, so that an audit that is run again pays for nothing twice.
    """
    model = locate_model(recipe.model.path)
    names = [name for name in judges.models(label_judge(recipe)) if not name.startswith(SERVER)]
    paths = {name: model if name in RUN else locate_model(name) for name in [*names, "current"]}
    machine = recipe.machine
    if machine.executor == "static":  # ranks follow runs, and an audit is none
        machine = machine.model_copy(update={"executor": "local"})
    with TemporaryDirectory() as folder, Executors() as executors:
        panel = Models(
            seed=lambda row: row_seed(recipe.seed, 0, "audit", row),
            engine_section=recipe.engine,
            servers=recipe.servers,
            paths=paths,
            identities={name: model_identity(path) for name, path in paths.items()},
            executor=executors.get(machine, Path(folder)),
            policy=model,
            logs=Path(folder),
            scratch=Path(folder),
            cache=Path("runs") / "audit",
            account="audit",
            progress=progress,
        )
        yield panel, Chat(model).tokenizer.encode


def label_judge(recipe: Recipe) -> Choice:
    """The judge that labels in a recipe.

    Raises:
        UserError: it has none.
    """
    if recipe.label.judge is None:
        raise UserError(f"recipe '{recipe.name}' has no label.judge to audit", "name a recipe with [label.judge]")
    return recipe.label.judge


def audit_pairs(pairs: Sequence[LabelledPair], choice: Choice, panel: Panel, encode: Encode | None = None) -> Audited:
    """Ask a judge about labelled pairs and audit what it says.

    A judge that compares is asked in both orders. One of single answers rates both answers once: the higher score is
    its preference and equal scores are a tie, so that there is no order to flip.

    Args:
        pairs: the pairs.
        choice: the judge, as a recipe names it.
        panel: the models that it may ask.
        encode: an answer's token ids; for judges that look at them.

    Raises:
        UserError: unknown judge or parameter, or a judge that looks at token ids and none can be had.
    """
    if encode is None and not READS_TOKENS.isdisjoint(one.name for one in [choice, *judges.members(choice)]):
        raise UserError(f"judge '{choice.name}' looks at token ids, which these pairs have not", "audit another judge")
    shown = [_candidates(pair, encode) for pair in pairs]
    scores = None
    if judges.compares(choice):
        preferences = judges.bind_comparer(choice)(shown, panel)
        verdicts = [(p.forward, p.swapped) for p in preferences]
        reasons = Counter(p.reason or "no reason given" for p in preferences if None in (p.forward, p.swapped))
    else:
        found = judges.bind(choice)([one for two in shown for one in two], panel)
        scores = audit_scores.audit(
            [
                Scored(one.prompt_id, len(one.text), opinion.score, opinion.reason)
                for one, opinion in zip((one for two in shown for one in two), found, strict=True)
            ]
        )
        verdicts = [(_preference(one, other), None) for one, other in zip(found[::2], found[1::2], strict=True)]
        reasons = Counter(opinion.reason or "no reason given" for opinion in found if opinion.score is None)
    rows = [
        Row(pair.human, forward, swapped, (len(pair.first), len(pair.second)))
        for pair, (forward, swapped) in zip(pairs, verdicts, strict=True)
    ]
    told = audit.audit(rows, both_orders=scores is None)
    return Audited(judges.identity(choice), told, scores, dict(reasons.most_common()))


def by_subset(files: Iterable[Sequence[LabelledPair]]) -> dict[str, Sequence[LabelledPair]]:
    """Files of pairs by the subset that each is.

    Raises:
        UserError: two have the same name.
    """
    found: dict[str, Sequence[LabelledPair]] = {}
    for pairs in files:
        if pairs[0].subset in found:
            raise UserError(f"two files of pairs are called {pairs[0].subset}", "--data names each file once")
        found[pairs[0].subset] = pairs
    return found


def audit_recorded(
    data: Mapping[str, Sequence[LabelledPair]], verdicts: Iterable[RecordedVerdict], strategy: str | None = None
) -> Recorded:
    """Audit recorded verdicts on labelled pairs, a group at a time.

    Args:
        data: pairs by subset, the name of their file. Verdicts that name no subset are on the only one there is.
        verdicts: the recorded verdicts, each of a pair in the data or of a subset that is not.
        strategy: of the judge; unset = all.

    Raises:
        UserError: a verdict on no pair of its subset, two on the same, one missing, another label than the data's,
            no verdict of that strategy, or none on this data.
    """
    groups: dict[tuple[str, str, str], dict[int, RecordedVerdict]] = {}
    strategies: dict[str, None] = {}
    left_out: dict[str, None] = {}
    for verdict in verdicts:
        strategies[verdict.strategy] = None
        if strategy is not None and verdict.strategy != strategy:
            continue
        subset = verdict.subset or _only(data, verdict)
        if subset not in data:
            left_out[subset] = None
            continue
        of_group = groups.setdefault((subset, verdict.judge, verdict.strategy), {})
        _check(verdict, data[subset], of_group)
        of_group[verdict.number] = verdict
    if strategy is not None and strategy not in strategies:
        named = ", ".join(filter(None, strategies)) or "none"
        raise UserError(f"no verdict of the strategy '{strategy}'", f"strategies of the file: {named}")
    if not groups:
        raise UserError(
            f"no verdict is on {', '.join(data)}: the file is on {', '.join(left_out)}",
            "--data names the file of pairs that was judged, once for each subset",
        )
    return Recorded([_group(name, data[name[0]], found) for name, found in groups.items()], list(left_out))


def _group(name: tuple[str, str, str], pairs: Sequence[LabelledPair], verdicts: Mapping[int, RecordedVerdict]) -> Group:
    if len(verdicts) < len(pairs):
        missing = next(i for i in range(len(pairs)) if i not in verdicts)
        called = "/".join(filter(None, name))
        raise UserError(
            f"{called}: {len(verdicts)} verdicts on {len(pairs)} pairs, the first without one is {missing}",
            "a verdict that could not be read is a row too, with null",
        )
    rows = [
        Row(pair.human, verdicts[i].forward, verdicts[i].swapped, (len(pair.first), len(pair.second)))
        for i, pair in enumerate(pairs)
    ]
    return Group(*name, audit.audit(rows, both_orders=verdicts[0].both_orders))


def _check(verdict: RecordedVerdict, pairs: Sequence[LabelledPair], of_group: Mapping[int, RecordedVerdict]) -> None:
    if not 0 <= verdict.number < len(pairs):
        raise UserError(
            f"{verdict.where}: a verdict on pair {verdict.number} of {len(pairs)}", "pairs are counted from 0"
        )
    if verdict.number in of_group:
        raise UserError(
            f"{verdict.where}: a second verdict on pair {verdict.number}, after {of_group[verdict.number].where}",
            "one row a pair, with both orders",
        )
    human = pairs[verdict.number].human
    if verdict.human is not None and verdict.human != human:
        raise UserError(
            f"{verdict.where}: the label says {verdict.human}, that of the data says {human}",
            "the verdicts are on another file, or on another version of it",
        )


def _only(data: Mapping[str, Sequence[LabelledPair]], verdict: RecordedVerdict) -> str:
    if len(data) != 1:
        raise UserError(f"{verdict.where}: the verdicts name no subset, but {len(data)} files of pairs are given", "")
    return next(iter(data))


def _candidates(pair: LabelledPair, encode: Encode | None) -> tuple[Candidate, Candidate]:
    """Both answers as samples of the current policy to one prompt, which is what judges are made for."""
    prompt_id = f"{pair.subset}/{pair.number}"
    first, second = (
        Candidate(prompt_id, pair.prompt, "current", k, text, encode(text) if encode else [], "stop")
        for k, text in enumerate((pair.first, pair.second))
    )
    return first, second


def _preference(one: Opinion, other: Opinion) -> float | None:
    if one.score is None or other.score is None:
        return None
    return 0.5 if one.score == other.score else float(one.score > other.score)
