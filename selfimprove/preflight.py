"""Whatever can be known to be wrong before a model is loaded."""

import inspect
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

from selfimprove import chat, data, judges
from selfimprove.combinations import fits_together, follows
from selfimprove.engine import checkpoints
from selfimprove.errors import UserError
from selfimprove.evaluation import lm_harness
from selfimprove.judges.panel import RUN
from selfimprove.judges.protocol import SERVER
from selfimprove.models import locate_model
from selfimprove.recipe import Benchmark, Choice, Machine, Noise, Optimizer, Recipe, Train
from selfimprove.records import Given, Seed
from selfimprove.remote.objects import Store
from selfimprove.stages import discriminate, evaluate, label, train


def check(chosen: Recipe) -> None:
    """Whatever can be known to be wrong before a model is loaded.

    Raises:
        UserError: a missing file, an unknown judge, rule or loss, a model directory that cannot serve.
    """
    settings(chosen)
    apart(chosen)
    measurable(chosen)
    if chosen.synthesize:
        data.read_paragraphs(data.locate(chosen.data.corpus, "corpus"))
    directory = locate_model(chosen.model.path)
    checkpoints.check_policy(directory)
    config = checkpoints.configuration(directory)
    positions = config.get("max_position_embeddings", config.get("n_positions"))  # the second: GPT-2 and its like
    if positions is not None and chosen.engine.max_model_len > positions and chosen.engine.kind != "fake":
        raise UserError(
            f"engine.max_model_len = {chosen.engine.max_model_len}, but the model has {positions} positions",
            f"set engine.max_model_len to {positions} or less",
        )
    adapted(chosen, directory)
    seeds = read_seeds(chosen)
    answered(chosen, seeds)
    pairs = read_pairs(chosen)
    enough(chosen, pairs)
    chunks = [chosen.at(iteration).train.chunks for iteration in range(1, chosen.rounds + 1)]
    by_source = any(one is not None and one.by == "source" for one in chunks)
    what = "pairs" if pairs else "seeds"
    if by_source and len({row.source for row in pairs or seeds}) < 2:
        raise UserError(
            f"train.chunks by source needs {what} of two data sources or more",
            f"name the 'source' of each row of data.{what}, or set train.chunks.by = \"pair\"",
        )
    rendered = chat.Chat(directory)
    longer: dict[str, int] = {}
    for seed in seeds:  # the template must keep the prompt a prefix, and add one BOS
        answer = 1 if seed.completion is None else len(rendered.completion_ids(seed.prompt, seed.completion))
        length = len(rendered.prompt_ids(seed.prompt)) + answer
        if length > chosen.engine.max_model_len:
            longer[seed.prompt_id] = length
    if longer:
        first = ", ".join(f"'{name}' has {length}" for name, length in list(longer.items())[:5])
        more = f", and {len(longer) - 5} more" if len(longer) > 5 else ""
        raise UserError(
            f"{len(longer)} of {len(seeds)} seeds have more tokens than engine.max_model_len ="
            f" {chosen.engine.max_model_len}: {first}{more}",
            f"shorten or remove them, or set engine.max_model_len to {max(longer.values())}",
        )


def adapted(chosen: Recipe, model: Path) -> None:
    """Whether the model has the layers that adapters name, which would else show after a round's answers are made.

    Raises:
        UserError: it lacks one; what an adapter needs is not installed.
    """
    rounds = [chosen.at(iteration) for iteration in range(1, chosen.rounds + 1)]
    found = [one.adapter for now in rounds for one in _optimizers(now) if one.adapter]
    if found:
        from selfimprove.training import adapters

        for position, adapter in enumerate(found):
            if adapter not in found[:position]:
                adapters.check(model, adapter)


def read_seeds(chosen: Recipe) -> list[Seed]:
    """The seeds, where something of the recipe uses them: given pairs have prompts of their own.

    Raises:
        UserError: the file cannot be read.
    """
    used = chosen.data.pairs is None or chosen.sft is not None or chosen.control is not None
    return data.read_seeds(data.locate(chosen.data.seeds, "seeds")) if used else []


def read_pairs(chosen: Recipe) -> list[Given]:
    """The pairs that the recipe gives, if any.

    Raises:
        UserError: the file cannot be read.
    """
    return data.read_pairs(data.locate(chosen.data.pairs, "pairs")) if chosen.data.pairs else []


def enough(chosen: Recipe, pairs: Sequence[Given]) -> None:
    """Whether each round has given pairs of its own.

    Raises:
        UserError: the last ones have none.
    """
    quota = chosen.label.quota
    if pairs and quota and quota * (chosen.rounds - 1) >= len(pairs):
        there = math.ceil(len(pairs) / quota)
        raise UserError(
            f"label.quota = {quota}: {len(pairs)} given pairs are enough for {there} rounds, not for {chosen.rounds}",
            f"lower it, or --rounds {there}",
        )


def answered(chosen: Recipe, seeds: Sequence[Seed]) -> None:
    """Whether the seeds have the gold answers that the recipe needs; judging the policy's own answers needs none.

    Raises:
        UserError: some are missing.
    """
    bare = [seed.prompt_id for seed in seeds if seed.completion is None]
    rounds = [chosen.at(iteration) for iteration in range(1, chosen.rounds + 1)]
    user = next((what for now in rounds for what, needed in gold_users(now).items() if needed), None)
    if bare and user:
        raise UserError(
            f"{user} needs gold answers, and {len(bare)} of {len(seeds)} seeds in {chosen.data.seeds} have none,"
            f" first '{bare[0]}'",
            "give every seed its answer, for example in field 'completion', or take this out of the recipe",
        )


def gold_users(chosen: Recipe) -> dict[str, bool]:
    """What of a recipe uses the seeds' gold answers where it is there, and whether it is."""
    rule = chosen.label.pairing
    anchored = rule.name == "dynamic" and (rule.model_extra or {}).get("anchor", "gold") == "gold"
    asked = {"label.judge": label.all_judges(chosen.label)}
    if chosen.discriminate:
        asked["discriminate.judge"] = [chosen.discriminate.judge]
    return {
        "[sft]": chosen.sft is not None,
        "[synthesize]": chosen.synthesize is not None,
        "[improve]": chosen.improve is not None,
        "generate.splice": chosen.generate is not None and chosen.generate.splice is not None,
        f"pairing '{rule.name}'": rule.name == "gold_vs_generated" or anchored,
        **{name: any(judges.needs_answer(one) for one in all_of) for name, all_of in asked.items()},
        "[control]": chosen.control is not None,
    }


def settings(chosen: Recipe) -> None:
    """Whatever can be known to be wrong without the data.

    Raises:
        UserError: an unknown judge, rule or loss, a combination that cannot work, a judge's model that cannot serve.
    """
    devices(chosen.machine)
    if chosen.machine.store:
        Store(chosen.machine.store)
    evaluate.check(chosen.evaluate)
    rounds = [chosen.at(iteration) for iteration in range(1, chosen.rounds + 1)]
    for iteration, now in enumerate(rounds, 1):
        if iteration == 1 or now != rounds[iteration - 2]:
            label.check(now.label)
            if now.discriminate:
                discriminate.check(now.discriminate)
            judged(now)
            fits_together(now)
            trainable(now)
            if now.train.reference_path:
                checkpoints.check_policy(locate_model(now.train.reference_path))
        if iteration > 1:
            follows(now, rounds[iteration - 2], iteration)


def devices(machine: Machine) -> None:
    """Whether the GPUs of this machine, if it has any, are as many as the recipe shares out.

    Raises:
        UserError: there are too few.
    """
    engines = machine.workers * machine.tensor_parallel if machine.executor == "local" else machine.tensor_parallel
    wanted = {"machine.workers x machine.tensor_parallel": engines, "machine.num_processes": machine.num_processes}
    if max(wanted.values()) == 1:
        return
    import torch

    for name, number in wanted.items():
        if 0 < torch.cuda.device_count() < number:
            raise UserError(
                f"{name} = {number}, and this machine has {torch.cuda.device_count()} GPU(s)", f"lower {name}"
            )


def apart(chosen: Recipe) -> None:
    """Whether no prompt stands in two of what is trained on, what the gate looks at, and what is reported.

    Reported are the held-out prompts and the benchmarks, which may share what they like.

    Raises:
        UserError: one does.
    """
    from selfimprove.evaluation import kinds

    rows: dict[str, Sequence[Seed | Given]] = {"data.seeds": read_seeds(chosen), "data.pairs": read_pairs(chosen)}
    trained = {name: [(row.prompt_id, row.prompt) for row in of] for name, of in rows.items()}
    reported = {"data.heldout": _held_out(chosen.data.heldout, "heldout")}
    looked_at = {"data.selection": _held_out(chosen.data.selection, "selection")} if chosen.data.selection else {}
    for benchmark in chosen.evaluate.benchmarks or []:
        name = f"evaluate.benchmarks.{benchmark.name}"
        reported[name] = kinds.held_out({next(iter(benchmark.files)): _located(benchmark)[0]})
    why = "what is trained on cannot be held out", "what the gate looks at cannot be what is reported"
    for ours, theirs, reason in [
        (trained, reported | looked_at, why[0]),
        (looked_at, reported, why[1]),
    ]:
        for (one, prompts), (other, others) in itertools.product(ours.items(), theirs.items()):
            folded = {data.fold(prompt) for _, prompt in others}
            if shared := [prompt_id for prompt_id, prompt in prompts if data.fold(prompt) in folded]:
                raise UserError(
                    f"{len(shared)} prompts of {one} stand in {other} too, the first is '{shared[0]}'",
                    f"remove them from one of the files: {reason}",
                )


def _held_out(path: str, what: str) -> list[tuple[str, str]]:
    return [(row.prompt_id, row.prompt) for row in data.read_heldout(data.locate(path, what), what)]


def _located(benchmark: Benchmark) -> list[Path]:
    """Its files, that of the prompts first."""
    given = {"path": benchmark.path, "answers": benchmark.answers}
    return [data.locate(path, f"{benchmark.name}.{key}", "evaluate.benchmarks") for key, path in given.items() if path]


def measurable(chosen: Recipe) -> None:
    """Whether the files of held-out prompts and benchmarks can be read, and have what their judges need.

    Raises:
        UserError: a file is missing or wrong, or a reference answer is missing.
    """
    from selfimprove.evaluation import kinds

    if judges.needs_answer(chosen.evaluate.judge):
        for what, path in [("heldout", chosen.data.heldout), ("selection", chosen.data.selection)]:
            rows = data.read_heldout(data.locate(path, what), what) if path else []
            if bare := [row.prompt_id for row in rows if row.answer is None]:
                raise UserError(
                    f"evaluate.judge needs reference answers, and {len(bare)} of {len(rows)} prompts of data.{what}"
                    f" have none, the first is '{bare[0]}'",
                    "give every row an 'answer', or choose another evaluate.judge",
                )
    for benchmark in chosen.evaluate.benchmarks or []:
        files = _located(benchmark)
        if benchmark.kind == lm_harness.KIND:
            if chosen.engine.kind == "fake":
                raise UserError(
                    f"benchmark '{benchmark.name}': lm-evaluation-harness loads the model itself, no engine of ours",
                    'set engine.kind = "vllm" or "transformers"',
                )
            continue  # its task was read for its prompts
        read = kinds.questions(benchmark, dict(zip(benchmark.files, files, strict=True)))
        needy = benchmark.judge is not None and judges.needs_answer(benchmark.judge)
        if needy and (bare := [one.prompt_id for one in read.questions if not one.answers]):
            raise UserError(
                f"benchmark '{benchmark.name}': its judge needs reference answers, and '{bare[0]}' has none",
                "give every prompt an answer, or choose another judge",
            )


CHECKS = {"reward_model": checkpoints.check_reward_model, "pairwise_ranker": checkpoints.check_ranker}  # of judges


def judged(chosen: Recipe) -> None:
    """Whether every judge has the models and servers that it asks.

    Raises:
        UserError: one is missing, or stands in the recipe for nothing.
    """
    section, known = chosen.label, chosen.servers
    asked = [*label.servers(section), *evaluate.servers(chosen.evaluate)]
    for one in [*label.all_judges(section), *evaluate.all_judges(chosen.evaluate)]:
        for name in [] if judges.members(one) else judges.models(one):
            if name not in RUN and not name.startswith(SERVER):
                CHECKS.get(one.name, checkpoints.check_weights)(locate_model(name))
            elif one.name in CHECKS:
                raise UserError(f"judge '{one.name}' needs a model of its kind, not '{name}'", "a directory or hub id")
    for name in asked:
        if name not in known:
            raise UserError(
                f"a judge asks 'server:{name}', and the recipe has no [servers.{name}]",
                f"servers of the recipe: {', '.join(sorted(known)) or 'none'}",
            )
        key = known[name].api_key_env
        if key is not None and not os.environ.get(key):
            raise UserError(f"servers.{name}: the environment variable {key} is not set", f"export {key}=...")
    if unused := sorted(known.keys() - set(asked)):
        raise UserError(f"no judge asks servers.{unused[0]}", f'for example label.judge.model = "server:{unused[0]}"')
    if section.relabel and chosen.train.pairs != "current":
        raise UserError(
            f"label.relabel carries the pairs of earlier rounds along, and train.pairs = '{chosen.train.pairs}' would"
            " train on them twice",
            'set train.pairs = "current"',
        )
    if section.audit and section.judge and judges.compares(section.judge):
        raise UserError(
            f"label.audit asks a judge of single answers again, and '{section.judge.name}' compares two",
            "remove [label.audit]: what both orders show is told in any case",
        )


NOISE = {  # the settings that each kind looks at
    "trainable": {"kind", "scale", "alpha", "bound", "learning_rate"},
    "fixed_sigma": {"kind", "sigma"},
    "constant_margin": {"kind", "margin"},
}


def trainable(chosen: Recipe) -> None:
    """Settings of the training that cannot work, said before any model is loaded.

    Raises:
        UserError: the first that is found.
    """
    from selfimprove.training import losses, noise, trackers

    section = chosen.train
    bound = losses.of(section)
    if section.search:
        searchable(section)
    for name in chosen.machine.trackers:
        trackers.check(name)
    quantized = any(one.adapter and one.adapter.quantize for one in _optimizers(chosen))
    kind = section.noise.kind if section.noise else ""
    idle = _idle(section.noise) if section.noise else []
    for wrong, sentence, hint in [
        (
            bool(bound.needs & {"win_rates", "win_probabilities"}) and chosen.label.judge is None,
            "this loss needs scores of the answers, and [label] has no judge",
            "add label.judge, or choose another loss",
        ),
        (
            "mismatched" in bound.needs and section.optimizer.batch_size < 2,
            "this loss looks at answers under other prompts of the batch, and train.optimizer.batch_size = 1",
            "raise train.optimizer.batch_size",
        ),
        (
            bool(idle),
            f"train.noise.{', train.noise.'.join(idle)} means nothing to the kind '{kind}'",
            "remove it, or set train.noise.kind",
        ),
        (
            section.noise is not None and bound.references != 1,
            "train.noise needs a loss with exactly one reference",
            'for example train.loss = { name = "dpo", beta = 0.1 }',
        ),
        (
            section.noise is not None and section.noise.scale >= noise.LIMIT * section.noise.bound,
            f"train.noise.scale must be below {noise.LIMIT:g} times train.noise.bound",
            "a smaller scale or a larger bound",
        ),
        (
            section.chunks is not None and bound.state is not None,
            "train.chunks starts each chunk with a fresh loss, and this one remembers earlier steps",
            "choose a loss without a queue or running mean, or drop train.chunks",
        ),
        (
            section.optimizer.adapter is not None
            and ("ema" in section.references or section.reference_sync is not None),
            "a reference that moves with the whole weights needs a policy without adapter",
            "drop train.optimizer.adapter, or reference_sync and the reference 'ema'",
        ),
        (
            quantized and chosen.machine.sharding == "fsdp",
            "adapter.quantize cannot be sharded",
            'set machine.sharding = "ddp"',
        ),
    ]:
        if wrong:
            raise UserError(sentence, hint)


def _optimizers(chosen: Recipe) -> list[Optimizer]:
    """Of all trainings of a round."""
    return [
        chosen.train.optimizer,
        *([chosen.synthesize.generator] if chosen.synthesize else []),
        *([chosen.improve.improver] if chosen.improve else []),
        *([chosen.discriminate.optimizer] if chosen.discriminate else []),
        *([chosen.sft.optimizer] if chosen.sft else []),
        *([chosen.control.optimizer] if chosen.control else []),
    ]


def _idle(section: Noise) -> list[str]:
    """What is set to something and changes nothing; a run's own recipe.toml names the defaults too."""
    fields = set(Noise.model_fields) - NOISE[section.kind]
    return sorted(name for name in fields if getattr(section, name) != Noise.model_fields[name].default)


def searchable(section: Train) -> None:
    """Whether the loss can be trained with every beta that is to be tried.

    Raises:
        UserError: a loss without beta, or with one already; a value that the loss does not take, or that stands twice.
    """
    from selfimprove.training import losses

    assert section.search is not None
    assert isinstance(section.loss, Choice)  # the recipe refuses a mix
    betas, name = section.search.betas, section.loss.name
    for wrong, sentence, hint in [
        (
            "beta" not in inspect.signature(losses.LOSSES[name].function).parameters,
            f"train.search looks for a beta, and loss '{name}' has none",
            "drop train.search, or choose a loss with a beta",
        ),
        (
            "beta" in (section.loss.model_extra or {}),
            "train.search looks for a beta, and train.loss names one already",
            f'drop it, for example train.loss = {{ name = "{name}" }}, or drop train.search',
        ),
        (len(set(betas)) != len(betas), "train.search.betas has a value twice", "give each once"),
    ]:
        if wrong:
            raise UserError(sentence, hint)
    for beta in betas:
        losses.of(train.with_beta(section, beta))
