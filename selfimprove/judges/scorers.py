"""Judges that read a number off a model instead of its words."""

from collections.abc import Sequence

from selfimprove.judges.protocol import Candidate, Opinion, Panel

TOO_LONG = "too long for the judge's context"


def logps(candidates: Sequence[Candidate], panel: Panel, *, model: str = "current") -> list[Opinion]:
    """The mean log-prob per token (nats) of an answer under a model: SimPO's implicit reward (arXiv 2405.14734)."""
    rows = [(candidate.prompt, candidate.token_ids) for candidate in candidates]
    return [
        Opinion(None, TOO_LONG if candidate.token_ids else "empty answer")
        if found is None
        else Opinion(sum(found) / len(found))
        for candidate, found in zip(candidates, panel.logps(model, rows), strict=True)
    ]


def reward_model(candidates: Sequence[Candidate], panel: Panel, *, model: str) -> list[Opinion]:
    """The logit of a sequence-classification model with one label, on the chat of prompt and answer."""
    rewards = panel.rewards(model, [(candidate.prompt, candidate.text) for candidate in candidates])
    return [Opinion(None, TOO_LONG) if reward is None else Opinion(reward) for reward in rewards]
