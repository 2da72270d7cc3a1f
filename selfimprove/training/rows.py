"""What may be trained on: rows checked for length, end tokens and BOS before a model is loaded."""

from collections.abc import Callable, Sequence

from selfimprove.errors import UserError
from selfimprove.recipe import Optimizer
from selfimprove.training.job import PairRow


def admit(
    rows: Sequence[PairRow],
    settings: Optimizer,
    stop_token_ids: Sequence[int],
    bos_token_id: int | None,
    dropped: Callable[[str, str], None],
    preferences: bool = True,
) -> list[PairRow]:
    """The rows that fit `max_length`; the others go to `dropped` with their reason, none is cut.

    Args:
        rows: pairs, or examples with a chosen answer alone where they are no `preferences`.
        settings: of the training.
        stop_token_ids: end tokens of the model.
        bos_token_id: the model's, if it has one.
        dropped: told the id of a row that is left out, and why.
        preferences: whether rejected answers are trained on.

    A chosen answer in which a policy has sampled a BOS goes too: what it teaches, no chat template can render.

    Raises:
        UserError: more rows are lost than the recipe allows, no chosen answer ends with an end token (the policy
            would never learn to stop), or a prompt has more than one BOS.
    """
    limit = settings.max_length
    bos = bos_token_id if bos_token_id is not None and bos_token_id not in stop_token_ids else None
    kept = []
    for row in rows:
        longest = len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids))
        if not row.chosen_ids:
            dropped(row.pair_id, "empty chosen answer")
        elif preferences and not row.rejected_ids:
            dropped(row.pair_id, "empty rejected answer")
        elif limit is not None and longest > limit:
            dropped(row.pair_id, "longer than max_length")
        elif bos in row.chosen_ids:
            dropped(row.pair_id, "BOS inside the chosen answer")
        else:
            kept.append(row)
    lost = len(rows) - len(kept)
    if lost > settings.max_dropped_share * len(rows):
        raise UserError(
            f"{lost} of {len(rows)} rows cannot be trained on: longer than max_length = {limit}, an empty answer, or a "
            "BOS inside it",
            "raise max_length, shorten the answers (max_tokens), or allow it with max_dropped_share",
        )
    if not kept:
        raise UserError("there is no row to train on", "see the stage before")
    if not any(row.chosen_ids[-1] in stop_token_ids for row in kept):
        raise UserError(
            "no chosen answer ends with an end token: the policy would never learn to stop",
            "raise max_tokens of the stage that wrote the answers, or mend the model's eos_token",
        )
    for row in kept:
        if bos is not None and row.prompt_ids.count(bos) > 1:
            count = row.prompt_ids.count(bos)
            raise UserError(f"the prompt of row '{row.pair_id}' has {count} BOS tokens", "mend the chat template")
    return kept
