"""DNPO's noise player: the frozen reference, the net that sets sigma, and the net's optimiser."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selfimprove import recipe
from selfimprove.training import distributed, noise
from selfimprove.training.distributed import World
from selfimprove.training.logps import Scorer
from selfimprove.training.packing import Packed


class Player:
    """Scores rejected answers under the noised reference and trains the net that noises it.

    Args:
        section: the recipe's.
        reference: the frozen reference; `module` is the same as the processes run it.
        learning_rate: the policy's, for a recipe that names none.
        seed: of the net's weights and of the draws.
        world: the processes.
    """

    def __init__(
        self,
        section: recipe.Noise,
        reference: Scorer,
        module: nn.Module,
        learning_rate: float,
        seed: int,
        world: World,
    ) -> None:
        self.section, self.reference, self.module, self.seed = section, reference, module, seed
        head = reference.model.get_output_embeddings().weight
        self.net: noise.NoiseNet | None = None
        self.optimizer: torch.optim.AdamW | None = None
        if section.kind == "trainable":
            self.net = noise.NoiseNet(
                head.shape[1], head.shape[0], seed=seed, scale=section.scale, bound=section.bound
            ).to(world.device)
            rate = section.learning_rate or learning_rate
            self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=rate, weight_decay=0.0)
        self.chunk_rows = max(1, reference.logits_bytes // (40 * head.shape[0]))  # ten tensors of float32 alive

    def score(self, packed: Packed, responses: Sequence[int], pair_ids: Sequence[str], step: int) -> noise.Noised:
        """Rejected answers, given by their numbers in the micro-batch, with fresh noise for the step."""
        with torch.no_grad():
            hidden = self.module(packed).hidden
        rows = [torch.nonzero(packed.responses == r)[:, 0] for r in responses]
        index = torch.cat(rows) if rows else packed.responses.new_zeros(0)
        return noise.noised_logps(
            self.section.sigma if self.net is None else self.net,
            self.reference.logits,
            hidden[index],
            packed.targets[index],
            pair_ids=pair_ids,
            lengths=[len(r) for r in rows],
            seed=self.seed,
            step=step,
            chunk_rows=self.chunk_rows,
        )

    def update(self, mean_sigma: Tensor, step: int, max_grad_norm: float, world: World) -> dict[str, float]:
        """The net's optimiser step; its metrics.

        Raises:
            NoiseDiverged: sigma ran away; the net is as it was.
        """
        sigma = mean_sigma.item()
        if self.net is None or self.optimizer is None:
            return {"noise/sigma": sigma}
        noise.check(sigma, self.section.bound, step)
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.net.parameters()]
        for parameter, gradient in zip(self.net.parameters(), gradients, strict=True):
            parameter.grad = distributed.sum_(gradient, world)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), max_grad_norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"noise/sigma": sigma, "noise/grad_norm": norm}

    def optimizers(self) -> list[tuple[Any, torch.optim.Optimizer]]:
        """What a checkpoint must hold."""
        return [] if self.net is None or self.optimizer is None else [(self.net, self.optimizer)]
