"""Judges that count: the majority of samples, what an earlier stage found, and several judges as one."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from selfimprove.judges.protocol import Candidate, Opinion, Panel, squeezed
from selfimprove.recipe import Choice


def self_consistency(
    candidates: Sequence[Candidate], panel: Panel | None = None, *, voters: Literal["current", "improver"] = "current"
) -> list[Opinion]:
    """Share of the voters' samples of the prompt that give the same answer (Wang et al., arXiv 2203.11171)."""
    votes: dict[str, Counter[str]] = {}
    for candidate in candidates:
        if candidate.source == voters:
            votes.setdefault(candidate.prompt_id, Counter())[squeezed(candidate.text)] += 1
    opinions = []
    for candidate in candidates:
        ballots = votes.get(candidate.prompt_id)
        if not ballots:
            opinions.append(Opinion(None, f"no sample of {voters} votes on this prompt"))
        else:
            opinions.append(Opinion(ballots[squeezed(candidate.text)] / ballots.total()))
    return opinions


def discriminator(candidates: Sequence[Candidate], panel: Panel) -> list[Opinion]:
    """What the stage `discriminate` found (D2PO, arXiv 2405.01511)."""
    unknown = Opinion(None, "the discriminator did not see it")
    return [panel.opinions.get((c.prompt_id, c.source, c.sample), unknown) for c in candidates]


def ensemble(
    candidates: Sequence[Candidate], panel: Panel, *, judges: list[Choice], combine: Literal["rank", "mean"] = "rank"
) -> list[Opinion]:
    """Several judges as one: the mean of the ranks that they give to a prompt's answers, or of their scores.

    A rank is the share of the prompt's other answers that score less, ties by half, so that scales need not agree. An
    answer that one of them cannot judge is unknown.
    """
    from selfimprove.judges import bind

    tables = [bind(choice)(candidates, panel) for choice in judges]
    found = []
    by_prompt: dict[str, list[int]] = {}
    for i, candidate in enumerate(candidates):
        by_prompt.setdefault(candidate.prompt_id, []).append(i)
    ranks = [_ranks(opinions, by_prompt.values()) if combine == "rank" else opinions for opinions in tables]
    for of in zip(*ranks, strict=True):
        scores = [opinion.score for opinion in of if opinion.score is not None]
        reply = "\n---\n".join(opinion.reply for opinion in of if opinion.reply)
        if len(scores) < len(of):
            reason = next(opinion.reason for opinion in of if opinion.score is None)
            found.append(Opinion(None, f"unknown to a member: {reason}", reply))
        else:
            found.append(Opinion(sum(scores) / len(scores), "", reply))
    return found


def _ranks(opinions: Sequence[Opinion], groups: Iterable[Sequence[int]]) -> list[Opinion]:
    found = list(opinions)
    for group in groups:
        known = {i: score for i in group if (score := opinions[i].score) is not None}
        for i, own in known.items():
            below = sum((own > other) + 0.5 * (own == other) for j, other in known.items() if j != i)
            found[i] = opinions[i]._replace(score=below / (len(known) - 1) if len(known) > 1 else 0.5)
    return found
