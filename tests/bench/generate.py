"""The stage's way to the engine beside raw vLLM: the same requests and settings, in turn; and a swap beside a start.

    python -m tests.bench.generate [--model DIR] [--prompts 512] [--n 4] [--repeats 5] [--out FILE.json]

Each side has an engine of its own for the whole time. Ours: StageIO.complete, with all that is kept for a kill on the
disk. Theirs: `LLM.generate` with the same token ids and SamplingParams; both sides end with ids, log-probs and
texts, ours with rows of them. Tokenizing the prompts counts on our side.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfimprove import data, recipe
from selfimprove.chat import Chat
from selfimprove.execution import Executors
from selfimprove.stages.io import Ask, StageIO
from selfimprove.store import Artifact, model_identity


def theirs(model: str, section: recipe.Engine, machine: recipe.Machine, pipe: Any) -> None:
    """A process with plain vLLM: answers lists of (prompt ids, seed) with (seconds, tokens)."""
    import torch

    on_gpu = torch.cuda.is_available()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    if not on_gpu:
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": str(machine.kv_cache_gib), "TORCHDYNAMO_DISABLE": "1"}
    import vllm

    llm = vllm.LLM(
        model=model,
        dtype=section.dtype,
        seed=0,
        max_model_len=section.max_model_len,
        max_num_seqs=machine.max_num_seqs,
        max_num_batched_tokens=max(section.max_model_len, 8192),
        gpu_memory_utilization=machine.gpu_memory_utilization,
        enforce_eager=not on_gpu,
        enable_chunked_prefill=on_gpu,
        generation_config="vllm",
        disable_log_stats=True,
    )
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        requests, n, temperature, max_tokens, stop = asked
        parameters = [
            vllm.SamplingParams(
                n=n, seed=seed, temperature=temperature, max_tokens=max_tokens, stop_token_ids=stop, logprobs=0
            )
            for _, seed in requests
        ]  # fmt: skip
        llm.reset_prefix_cache()
        began = time.perf_counter()
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        took = time.perf_counter() - began
        pipe.send((took, sum(len(one.token_ids) for output in outputs for one in output.outputs)))


def stage(folder: Path, model: Path, section: recipe.Engine, machine: recipe.Machine, executors: Executors) -> StageIO:
    """A stage with nothing kept from before."""
    out = Artifact(folder / "stage")
    out.begin()
    return StageIO(
        iteration=1, stage="2-generate", seed=0, engine_section=section, machine=machine, inputs={},
        models={"current": model}, identities={"current": model_identity(model)}, out=out, scratch=folder / "scratch",
        cache=folder / "cache", executor=executors.get(machine, folder / "logs"), policy=model, logs=folder / "logs",
        servers={}, progress=lambda what, done, total: None,
    )  # fmt: skip


def spread(values: Sequence[float]) -> list[float]:
    """Least, median, most."""
    return [round(one, 4) for one in (min(values), statistics.median(values), max(values))]


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=data.SHIPPED["demo:model"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--memory", type=float, default=0.4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    section = recipe.Engine(dtype=given.dtype, max_model_len=256)
    machine = recipe.Machine(threads=given.threads, gpu_memory_utilization=given.memory)
    sampling = recipe.Sampling(temperature=1.0, max_tokens=given.max_tokens)
    prompts = [row.prompt for row in data.read_seeds(data.SHIPPED["demo:seeds"])]
    asks = [Ask(f"p{k}", prompts[k % len(prompts)]) for k in range(given.prompts)]
    chat = Chat(given.model)

    if given.threads:  # before the process starts: torch reads them when it is imported
        os.environ |= {"OMP_NUM_THREADS": str(given.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    ours, other = context.Pipe()
    process = context.Process(target=theirs, args=(str(given.model), section, machine, other), daemon=True)
    process.start()
    ours.recv()
    raw_start = time.perf_counter() - began

    with tempfile.TemporaryDirectory() as name, Executors() as executors:
        folder = Path(name)
        began = time.perf_counter()
        engine = executors.engines.get(section, machine, given.model, folder / "logs" / "engine.log")
        engine.swap(given.model)
        start = time.perf_counter() - began
        ratios, rates, raw_rates, tokens = [], [], [], []
        for repeat in range(-1, given.repeats):  # the first one warms up
            io = stage(folder / f"{repeat}", given.model, section, machine, executors)
            requests = [
                (chat.prompt_ids(ask.text), io.row_seed(f"{repeat}/{ask.prompt_id}/{ask.sample}")) for ask in asks
            ]

            def raw(requests: list[tuple[list[int], int]] = requests) -> tuple[float, int]:
                ours.send((requests, given.n, sampling.temperature, sampling.max_tokens, chat.stop_token_ids))
                found: tuple[float, int] = ours.recv()
                return found

            def whole(io: StageIO = io, repeat: int = repeat) -> tuple[float, int]:
                began = time.perf_counter()
                rows = list(io.complete("", given.model, asks, given.n, sampling, f"{repeat}"))
                return time.perf_counter() - began, sum(len(row.token_ids) for row in rows)

            sides = {"raw": raw, "whole": whole}
            found = {side: sides[side]() for side in (sides if repeat % 2 else reversed(list(sides)))}
            if repeat >= 0:
                (raw_took, raw_tokens), (took, written) = found["raw"], found["whole"]
                ratios.append((written / took) / (raw_tokens / raw_took))
                rates.append(written / took)
                raw_rates.append(raw_tokens / raw_took)
                tokens.append(written / raw_tokens)
        copy = folder / "copy"
        swaps = []
        import shutil

        shutil.copytree(given.model, copy)
        for k in range(6):
            began = time.perf_counter()
            engine.swap(copy if k % 2 == 0 else given.model)
            swaps.append(time.perf_counter() - began)
    ours.send(None)
    told = {
        "prompts": given.prompts,
        "n": given.n,
        "ratio of throughput, ours to raw": spread(ratios),
        "tokens/s": spread(rates),
        "raw tokens/s": spread(raw_rates),
        "tokens, ours to raw": spread(tokens),
        "engine start, s": round(start, 2),
        "raw engine start, s": round(raw_start, 2),
        "swap, s": spread(swaps[1:]),  # the first has no canary of these weights saved and computes one
        "swap to start": round(statistics.median(swaps[1:]) / start, 4),
    }
    print(json.dumps(told, indent=1))
    if given.out:
        given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
