"""Whatever can be known to be wrong before a model is loaded."""

import json

from selfimprove import chat, data
from selfimprove.errors import UserError
from selfimprove.models import locate_model
from selfimprove.recipe import Recipe
from selfimprove.stages import evaluate, label


def check(chosen: Recipe) -> None:
    """Whatever can be known to be wrong before a model is loaded.

    Raises:
        UserError: a missing file, an unknown judge, rule or loss, a model directory that cannot serve.
    """
    for name in ("seeds", "heldout", *(["corpus"] if chosen.synthesize else [])):
        path = data.locate(getattr(chosen.data, name), name)
        {"seeds": data.read_seeds, "heldout": data.read_heldout, "corpus": data.read_paragraphs}[name](path)
    label.check(chosen.label)
    evaluate.check(chosen.evaluate)
    fits_together(chosen)
    from selfimprove.training import losses

    losses.of(chosen.train)
    directory = locate_model(chosen.model.path)
    positions = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    if positions is not None and chosen.engine.max_model_len > positions:
        raise UserError(
            f"engine.max_model_len = {chosen.engine.max_model_len}, but the model has {positions} positions",
            f"set engine.max_model_len to {positions} or less",
        )
    seeds = data.read_seeds(data.locate(chosen.data.seeds, "seeds"))
    rendered = chat.Chat(directory)
    for seed in seeds:  # the template must keep the prompt a prefix, and add one BOS
        completion = rendered.completion_ids(seed.prompt, seed.completion)
        length = len(rendered.prompt_ids(seed.prompt)) + len(completion)
        if length > chosen.engine.max_model_len:
            raise UserError(
                f"seed '{seed.prompt_id}' has {length} tokens, engine.max_model_len is {chosen.engine.max_model_len}",
                "shorten or remove the seed, or raise engine.max_model_len",
            )
    heldout = {data.fold(row.prompt) for row in data.read_heldout(data.locate(chosen.data.heldout, "heldout"))}
    shared = [seed for seed in seeds if data.fold(seed.prompt) in heldout]
    if shared:
        raise UserError(
            f"{len(shared)} prompts of data.seeds stand in data.heldout too, the first is '{shared[0].prompt_id}'",
            "remove them from one of the files: what is trained on cannot be held out",
        )


def fits_together(chosen: Recipe) -> None:
    """Combinations of settings that would fail, or be ignored, hours into a run.

    Raises:
        UserError: the first that is found.
    """
    rule, judge, generated = chosen.label.pairing.name, chosen.label.judge, chosen.generate
    checker = (judge.model_extra or {}).get("checker") if judge else None
    room = chosen.engine.max_model_len
    samplings = {
        "generate.sampling": generated.sampling,
        "synthesize.sampling": chosen.synthesize and chosen.synthesize.sampling,
        "improve.sampling": chosen.improve and chosen.improve.sampling,
    }
    longest = {name: sampling.max_tokens for name, sampling in samplings.items() if sampling}
    longest["evaluate"] = chosen.evaluate.max_tokens
    for wrong, sentence, hint in [
        *(
            (tokens >= room, f"{name}.max_tokens = {tokens} leaves no room for a prompt", "raise engine.max_model_len")
            for name, tokens in longest.items()
        ),
        (
            rule == "gold_vs_generated" and chosen.synthesize is not None,
            "pairing 'gold_vs_generated' needs golds, and synthesised prompts have none",
            "drop the stage synthesize, or choose another rule",
        ),
        (
            rule == "improver_vs_initial" and (chosen.improve is None or not generated.initial_n),
            "pairing 'improver_vs_initial' needs the stage improve and answers of the initial model",
            "see pipelines/synpo.toml: stages, generate.initial_n",
        ),
        (
            checker == "exact" and chosen.synthesize is not None,
            "label.judge checker 'exact' needs reference answers, and synthesised prompts have none",
            'for example label.judge = { name = "self_consistency" }',
        ),
        (
            chosen.evaluate.judge.name == "self_consistency",
            "evaluate.judge 'self_consistency' cannot score held-out answers",
            'for example evaluate.judge = { name = "verifier", checker = "exact" }',
        ),
        (
            rule == "best_vs_worst" and generated.n < 2,
            "pairing 'best_vs_worst' needs at least two answers to a prompt, generate.n = 1",
            "raise generate.n",
        ),
        (
            generated.sampling.temperature == 0 and generated.n > 1,
            f"generate.n = {generated.n} at temperature 0 would be the same answer again and again",
            "raise generate.sampling.temperature, or set generate.n = 1",
        ),
        (
            chosen.improve is not None and chosen.improve.n > generated.n,
            f"improve.n = {chosen.improve.n if chosen.improve else 0} needs as many drafts, generate.n = {generated.n}",
            "raise generate.n",
        ),
    ]:
        if wrong:
            raise UserError(sentence, hint)
