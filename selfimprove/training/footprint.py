"""Bytes of a training that stay on each device: arithmetic for plans, free of torch."""

from typing import NamedTuple

from selfimprove.recipe import Machine, Optimizer

FLOAT32, BFLOAT16 = 4, 2
NF4 = 0.516  # 4 bits, and the scale of each 64 in 8 bits with a float32 for 256 of these (arXiv 2305.14314)


class Footprint(NamedTuple):
    """Bytes on each device."""

    weights: int
    gradients: int
    moments: int  # AdamW's two
    references: int

    @property
    def total(self) -> int:
        """All of it. Activations, log-prob tiles (`machine.logits_mib`) and what a library keeps come on top."""
        return sum(self)


def footprint(parameters: int, trainable: int, optimizer: Optimizer, machine: Machine, references: int) -> Footprint:
    """What one device holds between two steps, and during one where that is more.

    Weights, gradients and moments are float32. FSDP2 cuts all of them into as many parts as there are processes; the
    layer, the embeddings and the head that it gathers for the moment come on top. DDP keeps them whole, and its
    gradients a second time in the buckets that are exchanged. In bfloat16 a process that holds whole weights keeps
    their copies during a pass.

    Args:
        parameters: of the model, adapters included.
        trainable: of them; all without an adapter.
        optimizer: dtype and adapter.
        machine: processes, nodes, sharding.
        references: frozen models that lie beside the policy: the moving ones and the noise player's. A reference whose
            log-probs are cached counts too, but only while it scores, before there are gradients and moments.
    """
    processes = machine.num_processes * machine.nodes
    sharded = machine.sharding == "fsdp" and processes > 1
    parts = processes if sharded else 1
    quantized = optimizer.adapter is not None and optimizer.adapter.quantize is not None
    frozen = NF4 if quantized else FLOAT32
    weights = (parameters - trainable) * frozen + trainable * FLOAT32
    if optimizer.dtype == "bfloat16" and not sharded:
        weights += (trainable if quantized else parameters) * BFLOAT16
    buckets = 2 if processes > 1 and not sharded else 1
    return Footprint(
        weights=_each(weights, parts),
        gradients=_each(trainable * FLOAT32 * buckets, parts),
        moments=_each(trainable * 2 * FLOAT32, parts),
        references=_each((parameters - (trainable if optimizer.adapter else 0)) * frozen * references, parts),
    )


def _each(size: float, parts: int) -> int:
    return -(-round(size) // parts)
