"""The model card and the dataset card of an exported policy, in Markdown with the hub's YAML header."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from selfimprove import __version__, exporting
from selfimprove.method import anonymous, settings
from selfimprove.release import OWN, PICKED, Labelled, Release
from selfimprove.report.escape import line
from selfimprove.results import MODES, Round, share

TEMPLATES = Path(__file__).parent
ROLES = {
    "seeds": "prompts, and gold answers where a method uses them",
    "corpus": "text that keywords for new prompts are drawn from",
    "heldout": "prompts of the scores below; they never enter training",
    "selection": "prompts that the gate looks at; they never enter training",
    "pairs": "the preference pairs that were trained on",
}
COLUMNS = {
    "prompt, chosen, rejected": "lists of `{role, content}`: TRL's conversational preference format",
    "pair_id, prompt_id, iteration": "names, and the round that the pair was made in",
    "chosen_source, rejected_source": "whose: `current` or `initial` policy, `improver`, `gold` (a seed's), `given`",
    "chosen_score, rejected_score": "of the judge; null where it is unknown or none was asked",
    "prompt_token_ids, chosen_token_ids, rejected_token_ids": "what training used, of this model's tokenizer",
    "source": "of the data, where the seeds or the given pairs name one",
}


def _of_benchmark(name: str) -> str:
    """What `benchmark:KIND:NAME` or `answers:NAME` is for."""
    what, *_, benchmark = name.split(":")
    return f"{'answers that belong to' if what == 'answers' else 'prompts of'} the benchmark {line(benchmark)}"


def model(made: Release, repo: str | None) -> str:
    """The model card; `repo` where it is pushed to."""
    from huggingface_hub import ModelCardData

    header = ModelCardData(
        base_model=made.base.name if made.base.hub else None,
        datasets=[repo] if repo else None,
        library_name="transformers",
        license=made.licence or "unknown",
        pipeline_tag="text-generation",
        tags=["selfimprove", "preference-optimization", *(f"arxiv:{number}" for number in made.papers)],
        model_name=_name(made),
        eval_results=_results(made),
    )
    return _render(
        "model_card.md.jinja",
        header=Markup(header.to_yaml()),
        made=made,
        name=_name(made),
        version=__version__,
        where=repo or exporting.MODEL,
        repo=repo,
        base=_base(made),
        gain=[row for row in _worded(made) if row["against"] == "base"],
        scores=[(name, _scores(of), row) for name, of in made.rounds.items() if (row := _conclusions(made, name))],
        picked=PICKED[made.picked],
        losses=_losses(made),
        trained=[
            (of, of.manifest.metrics, _counted(of.manifest.metrics["policy rows dropped"])) for of in made.trained
        ],
        labelled=made.labelled,
        roles=ROLES | {of.name: _of_benchmark(of.name) for of in made.data if ":" in of.name},
        limits=list(_limits(made)),
        settings=_fenced(settings(made.recipe)),
    )


def dataset(made: Release, repo: str | None) -> str:
    """The dataset card of the pairs that the policy was trained on."""
    from huggingface_hub import DatasetCardData

    rounds = [of.iteration for of in made.labelled]
    configs = [{"config_name": "default", "data_files": f"{exporting.DATA}/*.parquet"}]
    configs += [
        {"config_name": f"round_{k}", "data_files": f"{exporting.DATA}/{exporting.shard_prefix(k)}-*.parquet"}
        for k in rounds
    ]
    header = DatasetCardData(
        license=made.licence or "unknown",
        task_categories=["text-generation"],
        pretty_name=f"Preference pairs of {_name(made)}",
        tags=["selfimprove", "preference", *([] if _all_given(made) else ["synthetic"])],
        configs=configs,
    )
    return _render(
        "dataset_card.md.jinja",
        header=Markup(header.to_yaml()),
        made=made,
        name=_name(made),
        version=__version__,
        where=repo or exporting.DATASET,
        columns={name: Markup(said) for name, said in COLUMNS.items()},
        labelled=[(of, _judge(of), _refused(of)) for of in made.labelled],
        sources={name: _summed(made, name) for name in ("chosen_source", "rejected_source", "source")},
        relabelled=made.recipe.label.relabel,
        total=sum(_rows(of) for of in made.labelled),
        unscored=sum(of.unscored for of in made.labelled),
        given=_all_given(made),
        golds="gold" in _summed(made, "chosen_source") | _summed(made, "rejected_source"),
    )


def _all_given(made: Release) -> bool:
    """Whether the pairs were there before the run."""
    return made.recipe.data.pairs is not None


def escaped(value: Any) -> Markup:
    """A value as text that Markdown and HTML take for nothing else."""
    if isinstance(value, Markup):
        return value
    text = line(value if isinstance(value, str) else str(value))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"[\\`*\[\]|#~!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text))


def _render(template: str, **told: Any) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=escaped, autoescape=False
    )
    text = environment.from_string((TEMPLATES / template).read_text(encoding="utf-8")).render(**told)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _name(made: Release) -> str:
    return f"{made.run}-round-{made.iteration}"


def _base(made: Release) -> str:
    if made.base.name.startswith("demo:"):
        return "selfimprove's embedded toy model"
    return made.base.name if made.base.hub else f"the local model {made.base.name}"


def _losses(made: Release) -> str:
    loss = made.recipe.train.loss
    return " and ".join(_choice(one.model_dump()) for one in (loss if isinstance(loss, list) else [loss]))


def _choice(told: Mapping[str, Any]) -> str:
    """A named choice with its parameters: `simpo (beta = 2.0)`."""
    rest = ", ".join(f"{key} = {value}" for key, value in anonymous(dict(told)).items() if key != "name")
    return f"{told['name']} ({rest})" if rest else str(told["name"])


def _judge(of: Labelled) -> str:
    judge = of.manifest.ingredients["section"].get("judge")
    return _choice(judge) if judge else "none: the rule looks at no score"


def _refused(of: Labelled) -> dict[str, int]:
    """Why prompts gave no pair, and why pairs were refused, by reason."""
    return {
        **of.manifest.rows.quarantined,
        **{f"{reason} (pairs)": count for reason, count in of.manifest.metrics.get("pairs refused", {}).items()},
    }


def _rows(of: Labelled) -> int:
    return sum(of.counts["chosen_source"].values())


def _summed(made: Release, column: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for of in made.labelled:
        for value, count in of.counts[column].items():
            found[value] = found.get(value, 0) + count
    return {value or "not named": count for value, count in found.items()} if any(found) else {}


def _counted(reasons: Mapping[str, int]) -> str:
    """`3: 2 too long, 1 empty`."""
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{sum(reasons.values())}: {told}" if told else "0"


def _scores(of: Round) -> list[Markup]:
    return [
        Markup(f"{share(score['value'])} [{share(score['ci95'][0])}, {share(score['ci95'][1])}]")
        for score in (of.scores[mode] for mode in MODES)
    ]


def _conclusions(made: Release, name: str) -> list[str]:
    """What may be said of the exported model against this one, a sentence a mode."""
    return ["", ""] if name == OWN else [row["sentence"] for row in _worded(made) if row["against"] == name]


def _worded(made: Release) -> list[dict[str, Any]]:
    """The comparisons; their sentences are our own words and need no escaping."""
    return [{**row, "sentence": Markup(row["sentence"])} for row in made.comparisons]


def _results(made: Release) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="heldout",
            dataset_name=next((of.file for of in made.data if of.name == "heldout"), "held-out prompts"),
            metric_type="accuracy",
            metric_name=f"{mode} score, 95 % interval [{share(low)}, {share(high)}], {score['n']} prompts",
            metric_value=score["value"],
        )
        for mode in MODES
        for score in [made.rounds[OWN].scores[mode]]
        for low, high in [score["ci95"]]
    ]


def _limits(made: Release) -> Iterator[str]:
    chosen = made.recipe
    if chosen.engine.kind == "fake":
        yield "Its answers were made up by a fake engine that tests use: no score here means anything."
    if made.base.name.startswith("demo:"):
        yield (
            "It is a toy: selfimprove's embedded default, a tiny model of a small world of word lists. It shows that "
            "the pipeline works, and is of no use for anything else."
        )
    own = made.rounds[OWN]
    prompts = own.scores[MODES[0]]["n"]
    judge = _choice(own.manifest.ingredients["section"]["judge"])
    yield f"Measured on {prompts} prompts of one file, scored by {judge}: as right as that is, and of that task only."
    yield f"One run with seed {chosen.seed}: how much another seed would differ was not measured."
    yield (
        "Not measured: other tasks, benchmarks and languages; safety, bias, truthfulness, toxicity; robustness; what "
        "people make of its answers; what it has forgotten of what the base could do."
    )
    if made.picked == "score":
        yield "The round was picked by its score on the very prompts reported here: expect a little less on new ones."
    if made.decision is None:
        yield "No gate looked at this round."
    if "SFT control" not in made.rounds:
        yield "No control was run: what plain supervised fine-tuning would give is unknown."
    if any(of.manifest.ingredients["section"].get("judge") for of in made.labelled):
        yield "The training pairs were labelled by a program or a model, not by people."
    if made.licence is None:
        yield "The licence is unknown: those of the base model and of the data apply, and were not looked at."


def _fenced(text: str) -> Markup:
    """A block of code whose fence is longer than any in it."""
    text = "\n".join(map(line, text.splitlines()))
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return Markup(f"{fence}toml\n{text}\n{fence}")
