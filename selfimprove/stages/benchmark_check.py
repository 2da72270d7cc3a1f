"""Whether a benchmark of a recipe can be run, before anything runs."""

from selfimprove import judges, recipe
from selfimprove.errors import UserError
from selfimprove.evaluation import lm_harness


def check(benchmark: recipe.Benchmark) -> None:
    """Whether a benchmark of a recipe has what its kind needs, and nothing else.

    Raises:
        UserError: a judge or a file too many, too few or of the wrong kind, or a package that is not installed.
    """
    from selfimprove.evaluation.kinds import KINDS

    where = f"evaluate.benchmarks '{benchmark.name}' (kind {benchmark.kind})"
    if benchmark.kind == lm_harness.KIND:
        _check_harness(benchmark, where)
        return
    kind, judge = KINDS[benchmark.kind], benchmark.judge
    compares = judge is not None and judges.compares(judge)
    for wrong, sentence, hint in [
        (kind.judge is None and judge is not None, "checks answers by itself", "drop its judge"),
        (
            kind.judge == "scores" and (judge is None or compares),
            "needs a judge that scores answers",
            'for example judge = { name = "rubric", model = "server:NAME", template = "ten" }',
        ),
        (
            kind.judge == "compares" and not compares,
            "needs a judge that compares answers",
            'for example judge = { name = "pairwise", model = "server:NAME" }',
        ),
        (kind.answers == "none" and benchmark.answers is not None, "has no file of answers", "drop answers"),
        (
            kind.answers == "needed" and benchmark.answers is None,
            "needs the baseline's answers",
            'answers = "FILE", a model_answer file of the benchmark',
        ),
    ]:
        if wrong:
            raise UserError(f"{where} {sentence}", hint)
    if judge:
        judges.check(judge)
        if judges.moves(judge):
            raise UserError(
                f"{where}: judge '{judge.name}' is another one in every round, and rounds could not be compared",
                'name a model that stays: model = "server:NAME", "initial", a directory or a hub id',
            )
    if benchmark.kind == "ifeval":
        from selfimprove.constraints import language

        language.check()


def _check_harness(benchmark: recipe.Benchmark, where: str) -> None:
    for name in ("judge", "answers", "max_tokens"):
        if getattr(benchmark, name) is not None:
            raise UserError(f"{where}: its task says all, and {name} is no part of it", f"drop {name}")
    if not lm_harness.installed():
        raise UserError(f"{where} needs lm-evaluation-harness", "pip install 'selfimprove[lm-eval]'")
