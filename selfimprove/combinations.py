"""Combinations of settings that would fail, or be ignored, hours into a run."""

from selfimprove import judges
from selfimprove.errors import UserError
from selfimprove.recipe import Generate, Recipe

Finding = tuple[bool, str, str]  # whether it is wrong, a sentence, a hint


def fits_together(chosen: Recipe) -> None:
    """Combinations of settings that would fail, or be ignored, hours into a run.

    Raises:
        UserError: the first that is found.
    """
    own = _written(chosen, chosen.generate) if chosen.generate else _given(chosen)
    for wrong, sentence, hint in [*_sources(chosen), *own, *_always(chosen)]:
        if wrong:
            raise UserError(sentence, hint)


def _sources(chosen: Recipe) -> list[Finding]:
    """Whether pairs come from answers of the run, or from a file."""
    rule = chosen.label.pairing.name
    writers = [stage for stage in ("synthesize", "generate", "improve", "discriminate") if stage in chosen.stages]
    return [
        (
            (rule == "given") != (chosen.data.pairs is not None),
            "label.pairing = 'given' and data.pairs go together",
            'data.pairs names a file of pairs, and label.pairing = "given" takes them',
        ),
        (
            rule == "given" and bool(writers),
            f"pairing 'given' takes the pairs of data.pairs, and the stage {', '.join(writers)} would be for nothing",
            f'stages = ["label", "train", "evaluate"], without [{"], [".join(writers)}]',
        ),
        (
            rule != "given" and chosen.generate is None,
            f"pairing '{rule}' needs the stage generate",
            'see pipelines/default.toml; for pairs of your own data.pairs and label.pairing = "given"',
        ),
    ]


def _given(chosen: Recipe) -> list[Finding]:
    """Of pairs that are given."""
    return [
        (
            chosen.rounds > 1 and chosen.label.quota is None,
            f"each of {chosen.rounds} rounds would train on all given pairs, from a policy that has learned them",
            "set label.quota, the pairs of a round, or rounds = 1 (--rounds 1)",
        ),
        (
            chosen.label.acquire is not None,
            "label.acquire looks at answers of the policy, and given pairs are not its own",
            "remove [label.acquire]",
        ),
    ]


def _written(chosen: Recipe, generated: Generate) -> list[Finding]:
    """Of pairs that are made of the policies' answers."""
    rule, acquire = chosen.label.pairing.name, chosen.label.acquire
    given = chosen.label.pairing.model_extra or {}
    anchor = given.get("anchor", "gold")
    return [
        (
            rule == "gold_vs_generated" and chosen.synthesize is not None,
            "pairing 'gold_vs_generated' needs golds, and synthesised prompts have none",
            "drop the stage synthesize, or choose another rule",
        ),
        (
            rule == "improver_vs_initial" and chosen.improve is None,
            "pairing 'improver_vs_initial' needs the stage improve",
            "see pipelines/synpo.toml: stages, [improve]",
        ),
        (
            rule == "improver_vs_initial" and given.get("rejected", "initial") == "initial" and not generated.initial_n,
            "pairing 'improver_vs_initial' rejects the initial model's answers, and generate.initial_n = 0 takes none",
            'set generate.initial_n = 1, or label.pairing.rejected = "current"',
        ),
        (
            rule == "dynamic" and anchor == "improver" and chosen.improve is None,
            "pairing 'dynamic' with anchor 'improver' needs the stage improve",
            'see pipelines/synpo.toml: stages, [improve]; or set label.pairing.anchor = "gold"',
        ),
        (
            rule == "dynamic" and anchor == "gold" and chosen.synthesize is not None,
            "pairing 'dynamic' with anchor 'gold' needs golds, and synthesised prompts have none",
            'drop the stage synthesize, or set label.pairing.anchor = "improver"',
        ),
        (
            rule in ("best_vs_worst", "best_vs_random", "all_pairs", "top_k") and generated.n < 2,
            f"pairing '{rule}' needs at least two answers to a prompt, generate.n = 1",
            "raise generate.n",
        ),
        (
            generated.sampling.temperature == 0 and generated.n > 1,
            f"generate.n = {generated.n} at temperature 0 would be the same answer again and again",
            "raise generate.sampling.temperature, or set generate.n = 1",
        ),
        (
            generated.splice is not None and chosen.synthesize is not None,
            "generate.splice needs golds, and synthesised prompts have none",
            "drop the stage synthesize, or generate.splice",
        ),
        (
            generated.splice is not None and generated.splice.segment > generated.sampling.max_tokens,
            f"generate.splice.segment = {generated.splice.segment if generated.splice else 0} is more than"
            f" generate.sampling.max_tokens = {generated.sampling.max_tokens}",
            "a shorter segment, or more max_tokens",
        ),
        (
            generated.policy == "average" and not chosen.train.average,
            "generate.policy = 'average' needs train.average",
            "for example train.average = 0.5",
        ),
        (
            acquire is not None and acquire.by in ("entropy", "certainty") and generated.n < 2,
            f"label.acquire by {acquire.by if acquire else ''} looks at several answers to a prompt, generate.n = 1",
            "raise generate.n",
        ),
        (
            acquire is not None and acquire.by == "entropy" and generated.splice is not None,
            "label.acquire by entropy needs answers of the policy's own, and spliced ones are partly the gold's",
            "drop generate.splice, or acquire by certainty",
        ),
        (
            acquire is not None
            and acquire.by == "entropy"
            and (generated.sampling.temperature, generated.sampling.top_p) != (1, 1),
            "label.acquire by entropy is an average over samples of the policy itself: temperature 1, top_p 1",
            "set generate.sampling.temperature = 1.0 and top_p = 1.0",
        ),
        (
            chosen.discriminate is not None and generated.n < 2,
            "the stage discriminate compares answers to a prompt, generate.n = 1",
            "raise generate.n",
        ),
        (
            chosen.discriminate is not None
            and judges.needs_answer(chosen.discriminate.judge)
            and chosen.synthesize is not None,
            "discriminate.judge needs reference answers, and synthesised prompts have none",
            "drop the stage synthesize, or choose another judge",
        ),
        (
            chosen.improve is not None and chosen.improve.n > generated.n,
            f"improve.n = {chosen.improve.n if chosen.improve else 0} needs as many drafts, generate.n = {generated.n}",
            "raise generate.n",
        ),
    ]


def _always(chosen: Recipe) -> list[Finding]:
    judge, chunks = chosen.label.judge, chosen.train.chunks
    checker = (judge.model_extra or {}).get("checker") if judge else None
    room = chosen.engine.max_model_len
    samplings = {
        "generate.sampling": chosen.generate and chosen.generate.sampling,
        "synthesize.sampling": chosen.synthesize and chosen.synthesize.sampling,
        "improve.sampling": chosen.improve and chosen.improve.sampling,
        "sft.sampling": chosen.sft and chosen.sft.ratings and chosen.sft.sampling,
    }
    longest = {name: sampling.max_tokens for name, sampling in samplings.items() if sampling}
    longest["evaluate"] = chosen.evaluate.max_tokens
    for benchmark in chosen.evaluate.benchmarks or []:
        longest[f"evaluate.benchmarks.{benchmark.name}"] = benchmark.max_tokens or 0
    return [
        *(
            (tokens >= room, f"{name}.max_tokens = {tokens} leaves no room for a prompt", "raise engine.max_model_len")
            for name, tokens in longest.items()
        ),
        (
            chosen.improve is not None and chosen.improve.kind == "gold_distillation" and chosen.improve.min_gap != 0,
            "improve.kind 'gold_distillation' trains on every gold and looks at no improve.min_gap",
            'set improve.min_gap = 0.0, or improve.kind = "improver"',
        ),
        (
            judge is not None and judges.needs_answer(judge) and chosen.synthesize is not None,
            f"label.judge checker '{checker}' needs reference answers, and synthesised prompts have none",
            'for example label.judge = { name = "self_consistency" }',
        ),
        (
            chunks is not None and chunks.by == "source" and chosen.synthesize is not None,
            "train.chunks by source needs data sources, and synthesised prompts have none",
            'drop the stage synthesize, or set train.chunks.by = "pair"',
        ),
        (
            chosen.gate is not None and chosen.gate.roll_back and chosen.train.average is not None,
            "a gate that rolls back does not take a policy back out of train.average",
            "set gate.roll_back = false, or drop train.average",
        ),
        (
            (judge is not None and judge.name == "discriminator") != (chosen.discriminate is not None),
            "the stage discriminate and label.judge 'discriminator' go together",
            "see pipelines/d2po.toml",
        ),
    ]


def follows(now: Recipe, before: Recipe, iteration: int) -> None:
    """What a round of a scheduled recipe needs of the round before.

    Raises:
        UserError: it is not there.
    """
    averaged = now.generate is not None and now.generate.policy == "average"
    if (now.train.average or averaged) and not before.train.average:
        raise UserError(
            f"round {iteration} uses the average of the policies, and round {iteration - 1} makes none",
            "set train.average in every round",
        )
    if now.train.replay and now.train.replay != before.train.replay:
        raise UserError(
            f"train.replay is not in round {iteration} what it is in round {iteration - 1}: what was drawn in earlier"
            " rounds is drawn again with the same settings",
            "leave train.replay out of the schedule",
        )
    if now.data.pairs and now.label.quota != before.label.quota:
        raise UserError(
            f"label.quota is not in round {iteration} what it is in round {iteration - 1}: it says which of the given"
            " pairs are whose",
            "leave label.quota out of the schedule",
        )
