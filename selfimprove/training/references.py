"""Reference log-probs: scored once and kept on disk by content, or scored beside the policy where the reference moves.

A cache is named by everything that settles its numbers, so that rounds and resumed runs share it and it cannot be
stale: weights, tokenizer and template (the model's identity), dtype, forward, and the token ids of each row.
"""

import hashlib
import os
import sys
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from selfimprove import interrupts
from selfimprove.training import distributed, weights
from selfimprove.training.distributed import World
from selfimprove.training.job import Tree
from selfimprove.training.logps import Scorer, score_tokens
from selfimprove.training.packing import share

SCORED = 512  # trees that are scored before they are kept
VERSION = 1  # of the scoring: another value of a row's log-probs is another version


class Cached:
    """A reference that stays: the sum over tokens of every answer's log-probs, float64, nats."""

    def __init__(self, sums: dict[bytes, float]) -> None:
        self._sums = sums

    def sum(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        """Of one answer."""
        return self._sums[digest(prompt, response)] if response else 0.0


class Live:
    """A reference that moves: the average of the policy's weights (SAPO), or synchronised with them (TR-DPO).

    Args:
        module: the reference model as the processes run it.
        how: "ema" follows at every step, "sync" at every `steps`-th.
        rate: decay of the average, or alpha of the synchronisation.
        steps: between synchronisations.
    """

    def __init__(self, module: nn.Module, how: Literal["ema", "sync"], rate: float, steps: int = 1) -> None:
        self.module, self.how, self.rate, self.steps = module, how, rate, steps

    def follow(self, policy: nn.Module, step: int) -> None:
        """Take in the policy after an optimiser step."""
        distributed.reshard(self.module)
        own, new = weights.parameters(self.module), weights.parameters(policy)
        if self.how == "ema":
            weights.ema_(own, new, self.rate)
        elif step % self.steps == 0:
            weights.sync_(own, new, self.rate)


Reference = Cached | Live


def digest(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """Sixteen bytes that name a prompt and its answer as token ids."""
    ids = array("q", [len(prompt), *prompt, *response])
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


class Store(NamedTuple):
    """The cache of one model."""

    directory: Path

    def read(self) -> dict[bytes, torch.Tensor]:
        """Per-token log-probs of every answer that was ever scored, float32; a damaged file is deleted with a word."""
        found: dict[bytes, torch.Tensor] = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                shard = load_file(path)
                names = shard["digests"].numpy().tobytes()
                parts = torch.split(shard["logps"], shard["lengths"].tolist())
            except (SafetensorError, KeyError, RuntimeError, FileNotFoundError) as error:
                path.unlink(missing_ok=True)  # of several processes each may come upon it
                print(
                    f"the cached reference log-probs {path} are damaged ({type(error).__name__}); scored anew",
                    file=sys.stderr,
                )
                continue
            found |= {names[16 * i : 16 * i + 16]: part for i, part in enumerate(parts)}
        return found

    def add(self, logps: dict[bytes, torch.Tensor]) -> None:
        """Keep more answers; the file appears whole or not at all."""
        if not logps:
            return
        names = b"".join(logps)
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{hashlib.blake2b(names, digest_size=16).hexdigest()}.safetensors"
        temporary = path.with_suffix(".tmp")
        tensors = {
            "digests": torch.frombuffer(bytearray(names), dtype=torch.uint8).reshape(-1, 16),
            "lengths": torch.tensor([len(v) for v in logps.values()]),
            "logps": torch.cat(list(logps.values())).float(),
        }
        try:
            save_file(tensors, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # a full disk needs the room
            temporary.unlink(missing_ok=True)
            raise


def place(folder: Path, identity: str, dtype: str, mode: str) -> Store:
    """Where the log-probs of a model lie; `identity` covers weights, tokenizer and chat template."""
    name = hashlib.sha256(f"{VERSION}/{identity}/{dtype}/{mode}".encode()).hexdigest()
    return Store(folder / name[:32])


def missing(trees: Iterable[Tree], known: dict[bytes, torch.Tensor]) -> list[Tree]:
    """What of the trees is not known yet."""
    wanted: dict[bytes, tuple[tuple[int, ...], list[int]]] = {}
    for tree in trees:
        for response in filter(None, tree.responses):
            name = digest(tree.prompt_ids, response)
            if name not in known:
                wanted[name] = (tuple(tree.prompt_ids), response)
    grouped: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, response in wanted.values():
        grouped.setdefault(prompt, []).append(response)
    return [Tree(list(prompt), responses) for prompt, responses in grouped.items()]


def score(
    scorer: Scorer, module: nn.Module, trees: Sequence[Tree], budget: int, world: World
) -> dict[bytes, torch.Tensor]:
    """Score a share of the trees' answers per token without gradient; every process must ask for its own."""
    parts = share([scorer.cost(tree) for tree in trees], world.size)
    plans = [scorer.micro_batches([trees[i] for i in part], budget) for part in parts]
    mine = [trees[i] for i in parts[world.rank]]
    tokens = score_tokens(scorer, module, mine, budget, calls=max(map(len, plans)))
    answers = [(tree.prompt_ids, response) for tree in mine for response in tree.responses]
    return {digest(*answer): logps for answer, logps in zip(answers, tokens, strict=True)}


def cached(
    scorer: Scorer, module: nn.Module, trees: Sequence[Tree], budget: int, world: World, store: Store | None
) -> Cached:
    """Sums under a reference that stays, scoring only what the store does not hold; kept part by part.

    Raises:
        KeyboardInterrupt: the user asked to stop; what is scored is kept.
    """
    known = store.read() if store else {}
    distributed.barrier(world)  # all have read before anyone adds, so that all miss the same
    new = missing(trees, known)
    for start in range(0, len(new), SCORED):  # the same parts again after a kill: a batch's other rows move last bits
        if world.size == 1:
            interrupts.check()
        scored = score(scorer, module, new[start : start + SCORED], budget, world)
        if store is None:
            known |= distributed.gathered(scored, world) if world.size > 1 else scored
        else:
            store.add(scored)
    if new and store is not None:
        distributed.barrier(world)
        known |= store.read()
    return cached_from(known)


def cached_from(logps: dict[bytes, torch.Tensor]) -> Cached:
    """Sums of per-token log-probs, in float64."""
    return Cached({name: tokens.double().sum().item() for name, tokens in logps.items()})
