"""Data files that are nearly right: of every format that a command reads, changed by bytes, by structure or by kind."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from selfimprove import recipe_file
from selfimprove.recipe import Recipe
from tests.fuzz import mutation

Rows = list[dict[str, Any]]


class Format(NamedTuple):
    """A file that commands read."""

    name: str
    valid: Callable[[random.Random], Any]  # rows, or text
    commands: Callable[[str], list[list[str]]]


def _rows(make: Callable[[random.Random, int], dict[str, Any]], number: int = 6) -> Callable[[random.Random], Rows]:
    return lambda rng: [make(rng, k) for k in range(number)]


def _score(kind: str, *more: str) -> Callable[[str], list[list[str]]]:
    return lambda file: [["score", kind, file, *more, "--json"]]


def _planned(*settings: str) -> Callable[[str], list[list[str]]]:
    """A recipe that names the file as FILE."""

    def commands(file: str) -> list[list[str]]:
        path = Path("recipe.toml")
        chosen = recipe_file.load(recipe_file.find("default"), [one.replace("FILE", file) for one in settings])
        path.write_text(recipe_file.dump(chosen), encoding="utf-8")
        return [["plan", "./recipe.toml", "--json"]]

    return commands


def _given(file: str) -> list[list[str]]:
    """A recipe that trains on the file's pairs."""
    table = recipe_file.load(recipe_file.find("sdpo")).model_dump(exclude_none=True)
    del table["generate"]
    table |= {"rounds": 1, "stages": ["label", "train", "evaluate"], "label": {"pairing": "given"}}
    table["data"]["pairs"] = file
    Path("recipe.toml").write_text(recipe_file.dump(Recipe.model_validate(table)), encoding="utf-8")
    return [["plan", "./recipe.toml", "--json"]]


def _toml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else f'{{name = "{value["name"]}", model = "initial"}}'


def _benchmark(kind: str, **more: Any) -> Callable[[str], list[list[str]]]:
    def commands(file: str) -> list[list[str]]:
        table = {"name": "own", "kind": kind, "path": file} | more
        inline = ", ".join(f"{name} = {_toml(one)}" for name, one in table.items())
        return _planned(f"evaluate.benchmarks=[{{{inline}}}]")(file)

    return commands


SCORES = {"name": "rubric", "model": "initial"}
COMPARES = {"name": "pairwise", "model": "initial"}
LLMBAR = {"subset": "right-pairs", "judge": "j", "strategy": "s", "label": "1", "fwd_winner": "1", "swp_winner": "2"}
MT = "Rating: [[7]]"
FORMATS = [
    Format(
        "seeds",
        _rows(
            lambda rng, k: {"id": f"s{k}", "prompt": f"Own prompt number {k}.", "completion": f"c{k}", "source": "a"}
        ),
        _planned("data.seeds='FILE'"),
    ),
    Format(
        "dialogues",
        _rows(
            lambda rng, k: rng.choice(
                [
                    {"messages": [{"role": "user", "content": f"Own {k}."}, {"role": "assistant", "content": "a"}]},
                    {"conversations": [{"from": "human", "value": f"Own {k}."}, {"from": "gpt", "value": "a"}]},
                    {"instruction": f"Own {k}.", "input": "b a", "output": "a b"},
                    {"prompt": [{"role": "user", "content": f"Own {k}."}], "completion": "a"},
                ]
            )
        ),
        _planned("data.seeds='FILE'"),
    ),
    Format(
        "preferences",
        _rows(
            lambda rng, k: rng.choice(
                [
                    {"prompt": f"Own {k}.", "chosen": "a b", "rejected": "b a", "source": "a"},
                    {
                        "id": k,
                        "chosen": [{"role": "user", "content": "Own."}, {"role": "assistant", "content": "a"}],
                        "rejected": [{"role": "user", "content": "Own."}, {"role": "assistant", "content": "b"}],
                    },
                ]
            )
        ),
        _given,
    ),
    Format(
        "heldout",
        _rows(lambda rng, k: {"id": f"h{k}", "prompt": f"Held-out prompt {k}.", "answer": "1"}),
        _planned("data.heldout='FILE'"),
    ),
    Format(
        "corpus", lambda rng: "red foxes meet tigers\ngreen boats left harbours\n" * 4, _planned("data.corpus='FILE'")
    ),
    Format(
        "labelled",
        _rows(lambda rng, k: {"input": f"p{k}", "output_1": "a", "output_2": "bb", "label": 1 + k % 2}),
        lambda file: [["audit", "--data", file, "--verdicts", "right-verdicts.jsonl", "--json"]],
    ),
    Format(
        "verdicts",
        _rows(lambda rng, k: {**LLMBAR, "index": k, "label": str(1 + k % 2)}),
        lambda file: [["audit", "--data", "right-pairs.jsonl", "--verdicts", file, "--json"]],
    ),
    Format(
        "pandalm",
        _rows(lambda rng, k: {"idx": k, "gpt_result": rng.choice(["1", "2", "Tie"])}),
        lambda file: [["audit", "--data", "right-pairs.jsonl", "--verdicts", file, "--json"]],
    ),
    Format(
        "alpaca",
        _rows(lambda rng, k: {"index": k, "preference": 1 + rng.random(), "len_1": 10 + k, "len_2": 20 - k}, 12),
        _score("alpaca_lc", "--resamples", "2", "--c", "1"),
    ),
    Format(
        "difficulty",
        lambda rng: "index,instruction_difficulty\n" + "".join(f"{k},{k / 7}\n" for k in range(12)),
        lambda file: [
            ["score", "alpaca_lc", "right-alpaca.jsonl", "--difficulty", file, "--resamples", "2", "--c", "1", "--json"]
        ],
    ),
    Format(
        "gamed",
        lambda rng: (
            "model,index,len_1,std_delta_len,instruction_difficulty,preference\n"
            + "".join(f"m,{k},{10 + k},{k / 9 - 0.5},{k / 7},{k / 12}\n" for k in range(12))
        ),
        lambda file: [
            [
                "score",
                "alpaca_lc",
                "right-alpaca.jsonl",
                "--difficulty",
                "right-difficulty.csv",
                "--gamed",
                file,
                "--resamples",
                "2",
                "--c",
                "1",
                "--json",
            ]
        ],
    ),
    Format(
        "battles",
        _rows(
            lambda rng, k: {
                "question_id": f"q{k // 2}",
                "model_a": "base",
                "model_b": f"m{k % 2}",
                "winner": rng.choice(["model_a", "model_b", "tie"]),
            }
        ),
        _score("arena_hard", "--resamples", "2"),
    ),
    Format(
        "judgments",
        _rows(lambda rng, k: {"question_id": f"q{k}", "model": "m", "games": [{"score": "A>B"}, {"score": "B>>A"}]}),
        _score("arena_hard", "--resamples", "2", "--baseline", "base"),
    ),
    Format(
        "gsm8k",
        _rows(lambda rng, k: {"question": "q", "ground_truth": f"#### {k}", "m": {"solution": f"#### {k % 3}"}}),
        _score("gsm8k"),
    ),
    Format(
        "own_gsm8k",
        _rows(lambda rng, k: {"question": "q", "answer": f"#### {k}", "response": "#### 1"}),
        _score("gsm8k"),
    ),
    Format(
        "ifeval",
        _rows(
            lambda rng, k: {
                "key": k,
                "prompt": f"p{k}",
                "response": "a, b.",
                "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
                "kwargs": [{}, {"relation": "at least", "num_words": 2}],
            }
        ),
        _score("ifeval"),
    ),
    Format(
        "mt_bench",
        _rows(lambda rng, k: {"question_id": k // 2, "model": f"m{k % 2}", "turn": 1, "judgment": MT, "score": 7.0}),
        _score("mt_bench"),
    ),
    Format(
        "arena_bench",
        _rows(lambda rng, k: {"question_id": k // 2, "model": f"m{k % 2}", "judgment": MT, "score": 7}),
        _score("arena_bench"),
    ),
    Format(
        "bench_prompts",
        _rows(lambda rng, k: {"id": f"b{k}", "prompt": f"Bench prompt {k}.", "answer": "1"}),
        _benchmark("prompts", judge=SCORES),
    ),
    Format("bench_gsm8k", _rows(lambda rng, k: {"question": f"q{k}", "answer": f"#### {k}"}), _benchmark("gsm8k")),
    Format(
        "bench_ifeval",
        _rows(
            lambda rng, k: {
                "key": k,
                "prompt": f"p{k}",
                "instruction_id_list": ["punctuation:no_comma"],
                "kwargs": [{}],
            }
        ),
        _benchmark("ifeval"),
    ),
    Format(
        "bench_alpaca",
        _rows(lambda rng, k: {"instruction": f"i{k}", "output": "o"}),
        _benchmark("alpaca_eval", judge=COMPARES),
    ),
    Format(
        "bench_mt",
        _rows(lambda rng, k: {"question_id": k, "turns": [f"t{k}", "again"]}),
        _benchmark("mt_bench", judge=SCORES),
    ),
    Format(
        "bench_arena",
        _rows(lambda rng, k: {"uid": f"u{k}", "prompt": f"p{k}"}),
        _benchmark("arena_hard", judge=COMPARES, answers="answers.jsonl"),
    ),
    Format(
        "lm_eval",
        lambda rng: (
            "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: right-alpaca.jsonl}}\n"
            "test_split: test\n"
            "doc_to_text: index\nmetric_list: [{metric: exact_match}]\n"
        ),
        _benchmark("lm_eval"),
    ),
    Format(
        "study",
        lambda rng: (
            'name = "s"\nseeds = [0, 1]\nrounds = 1\nbaselines = ["a"]\n[worlds.w]\ntitle = "W"\n'
            '[arms.a]\nrecipe = "default"\n[arms.b]\nrecipe = "default"\nset = { "train.optimizer.epochs" = 2 }\n'
            '[arms.b.in.w]\nset = { "generate.n" = 2 }\n'
        ),
        lambda file: [["study", file, "--report-only", "--out", "out/report.md", "--json", "out/report.json"]],
    ),
]
ENDINGS = {"difficulty": ".csv", "gamed": ".csv", "lm_eval": ".yaml", "study": ".toml", "corpus": ".txt"}


def prepare(folder: Path) -> None:
    """The files that stand beside a fuzzed one."""
    rng = random.Random(0)
    by_name = {one.name: one for one in FORMATS}
    for name, path in (("labelled", "right-pairs.jsonl"), ("alpaca", "right-alpaca.jsonl")):
        (folder / path).write_bytes(lines(by_name[name].valid(rng)))
    (folder / "right-difficulty.csv").write_text(by_name["difficulty"].valid(rng))
    verdicts = [row | {"subset": "labelled"} for row in by_name["verdicts"].valid(rng)]
    (folder / "right-verdicts.jsonl").write_bytes(lines(verdicts))
    answers = [{"uid": f"u{k}", "messages": [{"role": "assistant", "content": "a"}]} for k in range(6)]
    (folder / "answers.jsonl").write_bytes(lines(answers))
    (folder / "folder").mkdir(exist_ok=True)
    (folder / "out").mkdir(exist_ok=True)


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def draw(rng: random.Random, form: Format) -> bytes:
    """Its content."""
    valid = form.valid(rng)
    if isinstance(valid, str):
        return mutation.content(rng, valid.encode()) if rng.random() < 0.95 else valid.encode()
    kind = rng.random()
    if kind < 0.45:
        for _ in range(rng.choice([1, 1, 2, 3])):
            k = rng.randrange(len(valid) or 1)
            valid = [*valid[:k], mutation.structure(rng, valid[k]), *valid[k + 1 :]] if valid else valid
        if rng.random() < 0.1:
            valid = mutation.structure(rng, valid)
    text = lines(valid) if isinstance(valid, list) and rng.random() < 0.7 else json.dumps(valid, indent=1).encode()
    return mutation.content(rng, text) if kind > 0.4 else text


def write(folder: Path, rng: random.Random, number: int) -> tuple[Format, Path]:
    """Writes the file of a case: content that is wrong or, now and then, something that is no file."""
    form = FORMATS[number % len(FORMATS)]
    path = folder / f"{form.name}{ENDINGS.get(form.name, '.jsonl')}"
    if rng.random() < 0.05 and not form.name.startswith(("study", "lm_eval")) and path.suffix == ".jsonl":
        path = path.with_name(path.name + ".gz")
    path.unlink(missing_ok=True)
    what = rng.random()
    if what < 0.02:
        os.mkfifo(path)
    elif what < 0.03:
        path.symlink_to(rng.choice(["nowhere", path.name, "folder", "/dev/zero", "/proc/self/mem"]))
    else:
        text = draw(rng, form)
        if path.suffix == ".gz":
            text = gzip.compress(text)
            text = mutation.content(rng, text) if rng.random() < 0.5 else text
        path.write_bytes(text)
    return form, path
