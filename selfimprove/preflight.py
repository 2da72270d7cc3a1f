"""Whatever can be known to be wrong before a model is loaded; and a rehearsal with the model, on the CPU."""

import inspect
import itertools
import os
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove import chat, data, judges
from selfimprove.engine import checkpoints
from selfimprove.engine.checkpoints import SAFE
from selfimprove.errors import UserError
from selfimprove.evaluation import lm_harness
from selfimprove.judges.panel import RUN
from selfimprove.judges.protocol import SERVER
from selfimprove.models import locate_model
from selfimprove.recipe import Benchmark, Choice, Machine, Recipe, Train
from selfimprove.remote.objects import Store
from selfimprove.stages import discriminate, evaluate, label, train
from selfimprove.training.job import PairRow


def check(chosen: Recipe) -> None:
    """Whatever can be known to be wrong before a model is loaded.

    Raises:
        UserError: a missing file, an unknown judge, rule or loss, a model directory that cannot serve.
    """
    devices(chosen.machine)
    if chosen.machine.store:
        Store(chosen.machine.store)
    evaluate.check(chosen.evaluate)
    apart(chosen)
    measurable(chosen)
    if chosen.synthesize:
        data.read_paragraphs(data.locate(chosen.data.corpus, "corpus"))
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
                locate_model(now.train.reference_path)
        if iteration > 1:
            follows(now, rounds[iteration - 2], iteration)
    directory = locate_model(chosen.model.path)
    positions = checkpoints.configuration(directory).get("max_position_embeddings")
    if positions is not None and chosen.engine.max_model_len > positions and chosen.engine.kind != "fake":
        raise UserError(
            f"engine.max_model_len = {chosen.engine.max_model_len}, but the model has {positions} positions",
            f"set engine.max_model_len to {positions} or less",
        )
    seeds = data.read_seeds(data.locate(chosen.data.seeds, "seeds"))
    by_source = any(now.train.chunks and now.train.chunks.by == "source" for now in rounds)
    if by_source and len({seed.source for seed in seeds}) < 2:
        raise UserError(
            "train.chunks by source needs seeds of two data sources or more",
            "name the 'source' of each row of data.seeds, or set train.chunks.by = \"pair\"",
        )
    rendered = chat.Chat(directory)
    for seed in seeds:  # the template must keep the prompt a prefix, and add one BOS
        completion = rendered.completion_ids(seed.prompt, seed.completion)
        length = len(rendered.prompt_ids(seed.prompt)) + len(completion)
        if length > chosen.engine.max_model_len:
            raise UserError(
                f"seed '{seed.prompt_id}' has {length} tokens, engine.max_model_len is {chosen.engine.max_model_len}",
                "shorten or remove the seed, or raise engine.max_model_len",
            )


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

    seeds = data.read_seeds(data.locate(chosen.data.seeds, "seeds"))
    trained = {"data.seeds": [(seed.prompt_id, seed.prompt) for seed in seeds]}
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
    """Whether the files of benchmarks can be read, and have what their judges need.

    Raises:
        UserError: a file is missing or wrong, or a reference answer is missing.
    """
    from selfimprove.evaluation import kinds

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
        trackers.module_of(name)
    used = [
        section.optimizer,
        *([chosen.synthesize.generator] if chosen.synthesize else []),
        *([chosen.improve.improver] if chosen.improve else []),
        *([chosen.discriminate.optimizer] if chosen.discriminate else []),
        *([chosen.sft.optimizer] if chosen.sft else []),
        *([chosen.control.optimizer] if chosen.control else []),
    ]
    quantized = any(one.adapter and one.adapter.quantize for one in used)
    for wrong, sentence, hint in [
        (
            bool(bound.needs & {"win_rates", "win_probabilities"}) and chosen.label.judge is None,
            "this loss needs scores of the answers, and [label] has no judge",
            "add label.judge, or choose another loss",
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


def follows(now: Recipe, before: Recipe, iteration: int) -> None:
    """What a round of a scheduled recipe needs of the round before.

    Raises:
        UserError: it is not there.
    """
    if (now.train.average or now.generate.policy == "average") and not before.train.average:
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


def fits_together(chosen: Recipe) -> None:
    """Combinations of settings that would fail, or be ignored, hours into a run.

    Raises:
        UserError: the first that is found.
    """
    rule, judge, generated = chosen.label.pairing.name, chosen.label.judge, chosen.generate
    acquire, chunks = chosen.label.acquire, chosen.train.chunks
    checker = (judge.model_extra or {}).get("checker") if judge else None
    given = chosen.label.pairing.model_extra or {}
    anchor = given.get("anchor", "gold")
    room = chosen.engine.max_model_len
    samplings = {
        "generate.sampling": generated.sampling,
        "synthesize.sampling": chosen.synthesize and chosen.synthesize.sampling,
        "improve.sampling": chosen.improve and chosen.improve.sampling,
        "sft.sampling": chosen.sft and chosen.sft.ratings and chosen.sft.sampling,
    }
    longest = {name: sampling.max_tokens for name, sampling in samplings.items() if sampling}
    longest["evaluate"] = chosen.evaluate.max_tokens
    for benchmark in chosen.evaluate.benchmarks or []:
        longest[f"evaluate.benchmarks.{benchmark.name}"] = benchmark.max_tokens or 0
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
            (judge is not None and judge.name == "discriminator") != (chosen.discriminate is not None),
            "the stage discriminate and label.judge 'discriminator' go together",
            "see pipelines/d2po.toml",
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
            chosen.improve is not None and chosen.improve.n > generated.n,
            f"improve.n = {chosen.improve.n if chosen.improve else 0} needs as many drafts, generate.n = {generated.n}",
            "raise generate.n",
        ),
    ]:
        if wrong:
            raise UserError(sentence, hint)


class Rehearsed(NamedTuple):
    """One thing that was tried out."""

    what: str
    found: str


def rehearse(chosen: Recipe) -> list[Rehearsed]:
    """`check`, and the training's own checks on the seeds as rows: a gold answer against another seed's.

    Raises:
        UserError: what would stop the run, or make it wrong, hours later.
    """
    from selfimprove.training.rows import admit

    check(chosen)
    stored: list[Rehearsed] = []
    if chosen.machine.store:
        Store(chosen.machine.store).probe()
        stored = [Rehearsed("store", "can be written, read and deleted in")]
    seeds = data.read_seeds(data.locate(chosen.data.seeds, "seeds"))
    model = locate_model(chosen.model.path)
    rendered = chat.Chat(model)
    others = [*seeds[1:], seeds[0]]
    rows = [
        PairRow(
            seed.prompt_id,
            rendered.prompt_ids(seed.prompt),
            rendered.completion_ids(seed.prompt, seed.completion),
            rendered.completion_ids(seed.prompt, other.completion),
        )
        for seed, other in zip(seeds, others, strict=True)
    ]
    dropped: list[str] = []
    bos = rendered.tokenizer.bos_token_id
    kept = admit(rows, chosen.train.optimizer, rendered.stop_token_ids, bos, lambda row, why: dropped.append(why))
    ended = sum(row.chosen_ids[-1] in rendered.stop_token_ids for row in kept)
    return [
        Rehearsed("recipe, data and model", "fit together"),
        *stored,
        Rehearsed("rows", f"{len(kept)} of {len(rows)} can be trained on, {len(dropped)} dropped, none truncated"),
        Rehearsed("end token", f"trained in {ended} of {len(kept)} chosen answers"),
        Rehearsed("prompt", "the template renders it as a prefix of prompt and answer, with at most one BOS"),
        *_first_step(chosen, model, kept[: min(8, chosen.train.optimizer.batch_size)]),
    ]


def _first_step(chosen: Recipe, model: Path, rows: list[PairRow]) -> list[Rehearsed]:
    """The packed forward against the plain one, and the loss where policy and reference are the same."""
    import torch
    import transformers

    from selfimprove.training import adapters, losses
    from selfimprove.training.logps import Scorer, choose_mode, sums
    from selfimprove.training.packing import trees_of

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **SAFE)
    if chosen.train.optimizer.adapter:
        adapters.attach(loaded, chosen.train.optimizer.adapter)
    scorer = Scorer(loaded.eval())
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
