"""A real run of the embedded default, looked at from outside: by datasets, trl, transformers and plain vLLM."""

import json
import os
import subprocess
import sys

import datasets
import pytest
import transformers
import trl

from selfimprove import records, store
from selfimprove.data import SHIPPED, read_heldout
from selfimprove.demo import world
from tests.conftest import selfimprove


def test_it_is_done_and_better_than_the_base(at_real_run):
    told = json.loads(selfimprove("status", "real", "--json").out)
    assert told["state"] == "done"
    last = told["iterations"][-1]["comparisons"]["base"]["sampled"]
    assert last["difference"] > 0.05
    assert last["p"] < 0.001
    assert told["control"]["scores"]["greedy"]["value"] > told["base"]["scores"]["greedy"]["value"]


def test_one_engine_served_the_whole_run(at_real_run):
    log = (at_real_run / "logs" / "engine.log").read_text(errors="replace")
    assert "engine rebuilt" not in log
    assert log.count("selfimprove: engine start") == 1


def test_datasets_opens_the_pairs_and_trl_accepts_them(at_real_run):
    pairs = datasets.load_dataset(
        "parquet", data_files=str(at_real_run / "iter-001/3-label/pairs-*.parquet"), split="train"
    )
    assert {"prompt", "chosen", "rejected"} <= set(pairs.column_names)
    assert trl.is_conversational(pairs[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(at_real_run / "iter-001/4-train/policy")
    for row in pairs.select(range(5)):
        rendered = trl.apply_chat_template({k: row[k] for k in ("prompt", "chosen", "rejected")}, tokenizer)
        ids = tokenizer(rendered["prompt"] + rendered["chosen"], add_special_tokens=False)["input_ids"]
        assert ids == row["prompt_token_ids"] + row["chosen_token_ids"]


def test_the_samples_are_scored_as_the_checker_scores_them(at_real_run):
    rows = store.read_rows(at_real_run / "iter-002/5-evaluate", "samples", records.Sample)
    assert len(rows) == 650 * 3
    assert [row.score for row in rows] == [float(world.check(row.prompt, row.text) or False) for row in rows]
    greedy = [row.score for row in rows if row.mode == "greedy"]
    scores = json.loads((at_real_run / "iter-002/5-evaluate/scores.json").read_text())
    assert scores["scores"]["greedy"]["value"] == pytest.approx(sum(greedy) / len(greedy))


PLAIN_VLLM = """
import sys, vllm
llm = vllm.LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128)
turns = [{"role": "user", "content": sys.argv[2]}]
[out] = llm.chat([turns], vllm.SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)
print("answer:" + out.outputs[0].text.strip())
"""


def test_the_last_policy_loads_with_plain_transformers_and_plain_vllm_and_answers_alike(at_real_run):
    policy = at_real_run / "iter-002" / "4-train" / "policy"
    prompt = read_heldout(SHIPPED["demo:heldout"])[0].prompt
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    model = transformers.AutoModelForCausalLM.from_pretrained(policy)
    turns = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=48)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer

    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    ended = subprocess.run(
        [sys.executable, "-c", PLAIN_VLLM, str(policy), prompt], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert f"answer:{answer}\n" in ended.stdout


def test_verify_and_report(at_real_run):
    assert selfimprove("verify", "real").code == 0
    path = at_real_run / "report.html"
    assert selfimprove("report", "real").out.strip().endswith("report.html")
    page = path.read_text(encoding="utf-8")
    assert "plain supervised fine-tuning of the base model on the seeds" in page
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert path.stat().st_size < 5_000_000


def test_every_generated_row_names_its_policy_and_seed(at_real_run):
    first, second = (
        store.read_rows(at_real_run / f"iter-00{t}/2-generate", "generations", records.Generation) for t in (1, 2)
    )
    assert {row.policy for row in first} == {store.model_identity(SHIPPED["demo:model"])}
    trained = store.model_identity(at_real_run / "iter-001" / "4-train" / "policy")
    assert {row.policy for row in second} == {trained}
    ingredients = json.loads((at_real_run / "iter-002/2-generate/manifest.json").read_text())["ingredients"]
    assert ingredients["models"] == {"current": trained}  # a row can be traced to its policy
    assert len({row.seed for row in first}) == len(first)
    assert all(len(row.logprobs) == len(row.token_ids) for row in first)


def test_a_generated_row_can_be_made_again_from_its_seed(at_real_run):
    from selfimprove.chat import Chat
    from selfimprove.engine.protocol import Options, Request, Sampling
    from selfimprove.engine.vllm_engine import VllmEngine

    rows = store.read_rows(at_real_run / "iter-002/2-generate", "generations", records.Generation)[5:60:9]
    policy = at_real_run / "iter-001" / "4-train" / "policy"
    chat = Chat(policy)
    engine = VllmEngine(policy, Options("float32", 256, 64, 1, 0.5, 1), at_real_run / "logs" / "again.log")
    try:
        sampling = Sampling(1.0, 1.0, 48, chat.stop_token_ids)
        requests = [Request(row.prompt_token_ids, 1, row.seed) for row in rows]
        again = engine.generate(requests, sampling, lambda done, total: None)
    finally:
        engine.close()
    assert [c.token_ids for [c] in again] == [row.token_ids for row in rows]
