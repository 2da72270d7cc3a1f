"""A rehearsal of the first training step with the model and the rows of a run, on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove import chat, data
from selfimprove.engine.checkpoints import SAFE
from selfimprove.errors import UserError
from selfimprove.models import locate_model
from selfimprove.preflight import check, read_pairs, read_seeds
from selfimprove.recipe import Recipe
from selfimprove.records import Given, Seed
from selfimprove.remote.objects import Store
from selfimprove.training.job import PairRow


class Rehearsed(NamedTuple):
    """One thing that was tried out."""

    what: str
    found: str


def rehearse(chosen: Recipe) -> list[Rehearsed]:
    """`check`, and the training's own checks on the given pairs, or on seeds: a gold answer against another seed's.

    The prompt itself stands in for a gold answer that a seed does not have.

    Raises:
        UserError: what would stop the run, or make it wrong, hours later.
    """
    from selfimprove.training.rows import admit

    check(chosen)
    stored: list[Rehearsed] = []
    if chosen.machine.store:
        Store(chosen.machine.store).probe()
        stored = [Rehearsed("store", "can be written, read and deleted in")]
    seeds, given = read_seeds(chosen), read_pairs(chosen)
    model = locate_model(chosen.model.path)
    rendered = chat.Chat(model)
    held_out = data.read_heldout(data.locate(chosen.data.heldout, "heldout"))
    doubled = len(held_out) - len({data.fold(row.prompt) for row in held_out})
    golds = sum(seed.completion is not None for seed in seeds)
    rows = [
        PairRow(
            one.prompt_id,
            rendered.prompt_ids(one.prompt),
            rendered.completion_ids(one.prompt, one.chosen),
            rendered.completion_ids(one.prompt, one.rejected),
        )
        for one in given or _pairs_of(seeds)
    ]
    dropped: list[str] = []
    bos = rendered.tokenizer.bos_token_id
    kept = admit(rows, chosen.train.optimizer, rendered.stop_token_ids, bos, lambda row, why: dropped.append(why))
    ended = sum(row.chosen_ids[-1] in rendered.stop_token_ids for row in kept)
    return [
        Rehearsed("recipe, data and model", "fit together"),
        *stored,
        *([Rehearsed("seeds", f"{len(seeds)}, {golds} of them with a gold answer")] if seeds else []),
        *([Rehearsed("pairs", f"{len(given)} given")] if given else []),
        Rehearsed(
            "held-out prompts",
            f"{len(held_out)}, {f'{doubled} of them again; each counts on its own' if doubled else 'each once'}",
        ),
        Rehearsed("rows", f"{len(kept)} of {len(rows)} can be trained on, {len(dropped)} dropped, none truncated"),
        Rehearsed("end token", f"trained in {ended} of {len(kept)} chosen answers"),
        Rehearsed("prompt", "the template renders it as a prefix of prompt and answer, with at most one BOS"),
        *_first_step(chosen, model, kept[: min(8, chosen.train.optimizer.batch_size)]),
    ]


def _pairs_of(seeds: Sequence[Seed]) -> list[Given]:
    """Each seed's answer against the next one's."""
    answers = [seed.prompt if seed.completion is None else seed.completion for seed in seeds]
    return [
        Given(seed.prompt_id, seed.prompt, answer, other)
        for seed, answer, other in zip(seeds, answers, [*answers[1:], answers[0]], strict=True)
    ]


def _first_step(chosen: Recipe, model: Path, rows: list[PairRow]) -> list[Rehearsed]:
    """The packed forward against the plain one, and the loss where policy and reference are the same."""
    import torch
    import transformers

    from selfimprove.training import adapters, losses
    from selfimprove.training.logps import Scorer, choose_mode, sums
    from selfimprove.training.packing import trees_of
    from selfimprove.training.trainer import without_dropout

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **SAFE)
    if chosen.train.optimizer.adapter:
        adapters.attach(loaded, chosen.train.optimizer.adapter)
    without_dropout(loaded)  # as the training does
    scorer = Scorer(loaded)
    shared = trees_of(rows)
    tried = choose_mode(scorer, shared.trees)
    forward = (
        f"equals plain rows to {tried.difference:.1e} nats a token"
        if tried.mode == "packed"
        else f"is wrong for this model ({tried.why}): training uses padded rows"
    )
    bound = losses.of(chosen.train)
    found = [Rehearsed("packed forward", forward)]
    if bound.references != 1 or bound.needs:
        return found  # no single value to compare with
    packed = scorer.pack(shared.trees)
    with torch.no_grad():
        ours = sums(scorer(packed).logps, packed)
        scorer.use("padded")
        plain = sums(scorer(packed).logps, packed)

    def loss(policy: torch.Tensor) -> float:
        q = losses.Quantities(
            policy_chosen_logps=policy[shared.chosen],
            policy_rejected_logps=policy[shared.rejected],
            reference_chosen_logps=plain[shared.chosen],
            reference_rejected_logps=plain[shared.rejected],
            chosen_tokens=torch.tensor([float(len(row.chosen_ids)) for row in rows]),
            rejected_tokens=torch.tensor([float(len(row.rejected_ids)) for row in rows]),
        )
        fresh = losses.of(chosen.train)  # its state must be that of the first step both times
        return fresh.function(fresh.state.before(q) if fresh.state else q).mean().item()

    measured, analytic = loss(ours), loss(plain)
    if not abs(measured - analytic) <= 1e-3 * max(1.0, abs(analytic)):
        raise UserError(
            f"the loss begins at {measured:.6g}, and at {analytic:.6g} where policy and reference are the same numbers",
            "the model's forward is not reproducible; try another dtype or attention implementation",
        )
    return [*found, Rehearsed("loss at the first step", f"{measured:.6f}, analytically {analytic:.6f}")]
