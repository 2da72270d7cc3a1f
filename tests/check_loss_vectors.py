"""Check the losses against a file of reference values: `python tests/check_loss_vectors.py FILE`.

The file has the format of tests/data/loss_vectors.json. A case is found by its loss and its parameters, whatever its
name and place. A case whose loss or parameters are unknown is named and skipped, never taken for a similar one. What
the programs behind the file drew at random (gamma-PO's queue, beta-DPO's selection) is read from the case.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfimprove.training import coupling, losses
from selfimprove.training.losses import Quantities

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-9, 1e-7
BCO_TOLERANCE = 1e-6  # BCO's program rounds its shift to float32, as the file's conventions say
NLL = {"batch_token_mean": "batch", "per_example_token_mean": "example"}
SIDES = ("chosen", "rejected")


class Unknown(Exception):
    """A case that this program does not know."""


class Finding(NamedTuple):
    """The outcome of one case: the differences that are too large, or why it was skipped."""

    name: str
    failures: Sequence[str] = ()
    skipped: str = ""


def _same(function: Callable[..., Tensor], *names: str) -> Callable[..., partial[Tensor]]:
    """For a loss whose parameters have our names: all of `names`, and no others."""

    def bind(**params: Any) -> partial[Tensor]:
        if set(params) != set(names):
            raise TypeError(f"expects {', '.join(names)}")
        return partial(function, **params)

    return bind


def _simpo(beta: float, gamma_beta_ratio: float, label_smoothing: float, loss_type: str) -> partial[Tensor]:
    gamma = beta * gamma_beta_ratio
    if loss_type == "hinge":  # whose formula has no label smoothing
        return partial(losses.simpo_hinge, beta=beta, gamma=gamma)
    if loss_type != "sigmoid":
        raise TypeError(f"loss_type {loss_type!r}")
    return partial(losses.simpo, beta=beta, gamma=gamma, label_smoothing=label_smoothing)


def _gamma(function: Callable[..., Tensor], *names: str) -> Callable[..., partial[Tensor]]:
    def bind(
        *, beta: float, gamma_beta_ratio: float, queue: str, n_iter: int, tau: float, **rest: Any
    ) -> partial[Tensor]:
        if set(rest) != set(names):
            raise TypeError(f"expects {', '.join(names) or 'nothing'} besides")
        return partial(function, beta=beta, gamma=beta * gamma_beta_ratio, tau=tau, steps=n_iter, **rest)

    return bind


def _with_nll(function: Callable[..., Tensor], **names: str) -> Callable[..., partial[Tensor]]:
    """For losses with an NLL part; `names` maps their parameters to ours."""

    def bind(*, nll: str, **params: Any) -> partial[Tensor]:
        if set(params) != set(names) or nll not in NLL:
            raise TypeError(f"expects nll in {', '.join(NLL)} and {', '.join(names)}")
        return partial(function, nll=NLL[nll], **{names[name]: value for name, value in params.items()})

    return bind


def _sppo(function: Callable[..., Tensor], kind: str) -> Callable[..., partial[Tensor]]:
    def bind(*, beta: float, loss_type: str = kind) -> partial[Tensor]:
        if loss_type != kind:
            raise TypeError(f"loss_type {loss_type!r}")
        return partial(function, beta=beta)

    return bind


def _mrpo(function: Callable[..., Tensor]) -> Callable[..., partial[Tensor]]:
    def bind(*, beta: float, eta: float, alpha: float) -> partial[Tensor]:
        clip = "fixed" if eta < 0 else "adaptive"  # the programs' ways to say so
        return partial(function, beta=beta, eta=abs(eta), clip=clip, alpha=None if alpha < 0 else alpha)

    return bind


def _beta_dpo(beta: float, a: float, mode_weight: float, gap_mean_before: float, gap_std_before: float) -> Any:
    return partial(coupling.beta_dpo, beta=beta, alpha=a, filtered=mode_weight)


# Upstream's name of a loss: from its parameters to our function, TypeError where it does not have them.
KNOWN: Mapping[str, Callable[..., Any]] = {
    "dpo_sigmoid": _same(losses.dpo, "beta"),
    "spin": _same(losses.dpo, "beta"),
    "sapo_dpo": _same(losses.dpo, "beta"),
    "d2po_policy": _same(losses.dpo, "beta"),
    "cdpo": _same(losses.dpo, "beta", "label_smoothing"),
    "robust_dpo": _same(losses.robust_dpo, "beta", "label_smoothing"),
    "dpo_length_norm": _same(losses.dpo_norm, "beta"),
    "ipo_avg": _same(losses.ipo, "beta"),
    "ipo_sum": _same(losses.ipo_sum, "beta"),
    "hinge": _same(losses.hinge, "beta"),
    "slic_hf": lambda *, beta, delta: partial(losses.slic_hf, beta=beta, delta=delta, nll_weight=0.0),
    "slic_hf_reg": lambda *, delta, lambda_: partial(losses.slic_hf, delta=delta, nll_weight=lambda_),
    "simpo": _simpo,
    "gammapo_simpo_ls": lambda *, beta, gamma_beta_ratio, label_smoothing: partial(
        losses.simpo_two_sided, beta=beta, gamma=beta * gamma_beta_ratio, label_smoothing=label_smoothing
    ),
    "gamma_simpo": _gamma(coupling.gamma_simpo),
    "gamma_dpo": _gamma(coupling.gamma_dpo, "label_smoothing", "length_norm"),
    "dpop": lambda *, beta, lambda_: partial(losses.dpop, beta=beta, penalty=lambda_),
    "minor_dpo": _same(losses.minor_dpo, "beta"),
    "r_dpo": _same(losses.r_dpo, "beta", "alpha"),
    "sppo": _sppo(losses.sppo, "sppo"),
    "sppo_single": _sppo(losses.sppo_single, "sppo_single"),
    "sppo_hard": _same(losses.sppo_hard, "beta"),
    "orpo": _with_nll(losses.orpo, lambda_="odds_weight"),
    "orpo_or_term": lambda *, lambda_: lambda q: -lambda_ * torch.nn.functional.logsigmoid(losses.log_odds(q)),
    "cpo": _with_nll(losses.cpo, beta="beta", alpha="nll_weight"),
    "arpo": _with_nll(
        losses.arpo, beta="beta", alpha="nll_weight", relax_cofficient_1="floor", relax_cofficient_2="growth"
    ),
    "apo_zero": _same(losses.apo_zero, "beta"),
    "apo_down": _same(losses.apo_down, "beta"),
    "kto": lambda *, kl, **params: _same(coupling.kto, "beta", "desirable_weight", "undesirable_weight")(**params),
    "kto_pair": _same(coupling.kto_pair, "beta"),
    "bco_pair_nodelta": _same(losses.bco_pair, "beta"),
    "bco": lambda *, beta, running_mean0=None, running_count0=None: partial(coupling.bco, beta=beta),
    "exo_pair": _same(losses.exo, "beta", "label_smoothing"),
    "nca_pair": _same(losses.nca, "beta"),
    "aot": _same(coupling.aot, "beta", "label_smoothing"),
    "aot_unpaired": _same(coupling.aot_unpaired, "beta", "label_smoothing"),
    "discopop": _same(losses.discopop, "beta", "tau"),
    "rpo": _with_nll(losses.rpo, beta="beta", alpha="nll_weight"),
    "mrpo": _mrpo(losses.mrpo),
    "multi_dpo": _mrpo(losses.multi_dpo),
    "beta_dpo": _beta_dpo,
    "wpo": _same(losses.wpo, "beta", "label_smoothing"),
    "wpo_trl_noclamp": lambda *, beta: partial(losses.wpo, beta=beta, clamp=False),
    "f_dpo_js": _same(losses.f_dpo_js, "beta"),
}


def ours(case: Mapping[str, Any]) -> Callable[[Quantities], Tensor]:
    """Our function for a case.

    Raises:
        Unknown: a loss or a parameter that we do not have.
    """
    if case["loss"] not in KNOWN:
        raise Unknown(f"unknown loss {case['loss']!r}")
    params = {"lambda_" if name == "lambda" else name: value for name, value in case["params"].items()}
    try:
        return KNOWN[case["loss"]](**params)  # type: ignore[no-any-return]
    except TypeError as error:
        raise Unknown(f"parameters {case['params']}: {error}") from None


def quantities(inputs: Mapping[str, Any], case: Mapping[str, Any]) -> Quantities:
    """The inputs of a case; what the file does not hold is None."""
    kl = case["params"].get("kl")
    q = Quantities(
        *(_leaf(inputs[f"policy_{side}_logps"]) for side in SIDES),
        *(_tensor(inputs.get(f"ref_{side}_logps")) for side in SIDES),
        *(torch.tensor(inputs[f"{side}_lengths"]) for side in SIDES),
        *(_tensor(inputs.get(f"ref1_{side}_logps")) for side in SIDES),
        chosen_win_rates=_tensor(inputs.get("sppo_chosen_probs_win")),
        rejected_win_rates=_tensor(inputs.get("sppo_chosen_probs_lose")),
        win_probabilities=_tensor(inputs.get("sppo_chosen_probs")),
        chosen_concentration=_tensor(inputs.get("wpo_chosen_mean_adj_logp")),
        rejected_concentration=_tensor(inputs.get("wpo_rejected_mean_adj_logp")),
        mismatched_policy_logps=_tensor(inputs.get(f"kl_policy_logps_{kl}")),
        mismatched_reference_logps=_tensor(inputs.get("kl_ref_logps")),
    )
    if case["loss"].startswith("gamma_"):
        return q._replace(other_gaps=torch.tensor(_queue(inputs, case), dtype=torch.float64))
    if case["loss"] == "bco":
        return _bco_state(case).before(q)
    if case["loss"] == "beta_dpo":
        return _beta_state(case).before(q)._replace(selected=_selected(case, len(q.policy_chosen_logps)))
    return q


def _extra(case: Mapping[str, Any]) -> Mapping[str, Any]:
    return case.get("extra") or {}


def _tensor(values: Any) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def _leaf(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def _queue(inputs: Mapping[str, Any], case: Mapping[str, Any]) -> list[float]:
    name = case["params"]["queue"]
    named = [] if name == "empty" else inputs.get(f"gamma_po_{name}")
    queue = _extra(case).get("queue", named)
    if queue is None:
        raise Unknown(f"the file has no queue {name!r}")
    return list(queue)


def _bco_state(case: Mapping[str, Any]) -> coupling.RunningReward:
    params, state = case["params"], coupling.RunningReward(case["params"]["beta"])
    state.load({"mean": params.get("running_mean0") or 0.0, "count": params.get("running_count0") or 0})
    return state


def _beta_state(case: Mapping[str, Any]) -> coupling.BetaSelection:
    params, state = case["params"], coupling.BetaSelection(0, case["params"]["mode_weight"])
    state.load(state.dump() | {"mean": params["gap_mean_before"], "deviation": params["gap_std_before"]})
    return state


def _selected(case: Mapping[str, Any], pairs: int) -> Tensor:
    extra = _extra(case)
    if "mask" in extra:
        return torch.tensor(extra["mask"]).bool()
    if "selected_index" not in extra:
        raise Unknown("the case names no selected pairs")
    return torch.zeros(pairs, dtype=torch.bool).index_fill(0, torch.tensor(extra["selected_index"]), True)


def check_case(inputs: Mapping[str, Any], case: Mapping[str, Any]) -> Finding:
    """Losses, objective and gradients of one case."""
    name = str(case.get("id", case["loss"]))
    if not {"losses", "loss_mean"} & case.keys():
        return Finding(name, skipped="the file has neither 'losses' nor 'loss_mean' of it")
    try:
        function, q = ours(case), quantities(inputs, case)
        found = function(q)
        objective = _objective(found, case)
    except (Unknown, ValueError) as error:  # ValueError: an input that the loss needs is not in the file
        return Finding(name, skipped=str(error))
    except KeyError as error:
        return Finding(name, skipped=f"the file has no {error}")
    objective.backward()
    tolerances = (BCO_TOLERANCE, BCO_TOLERANCE) if case["loss"] == "bco" else (LOSS_TOLERANCE, GRADIENT_TOLERANCE)
    gradients = {f"grad_policy_{side}_logps": getattr(q, f"policy_{side}_logps").grad for side in SIDES}
    return Finding(
        name,
        [
            *(difference("losses", found, _expected(case, q), tolerances[0]) if "losses" in case else []),
            *(difference("loss_mean", objective, case["loss_mean"], tolerances[0]) if "loss_mean" in case else []),
            *(
                line
                for key, found in gradients.items()
                if key in case
                for line in difference(key, found, case[key], tolerances[1])
            ),
            *_state_differences(inputs, case),
        ],
    )


def _objective(found: Tensor, case: Mapping[str, Any]) -> Tensor:
    match case.get("reduction", "mean"):
        case "mean" | "masked mean over selected pairs":  # our entries of beta-DPO have the masked mean as their mean
            return found.mean()
        case "sum":
            return found.sum()
        case other:
            raise Unknown(f"reduction {other!r}")


def _expected(case: Mapping[str, Any], q: Quantities) -> Any:
    if case["loss"] != "beta_dpo":
        return case["losses"]
    assert q.selected is not None
    weights = q.selected.double() / q.selected.double().mean()  # the file lists losses before the masked mean
    return (weights * torch.tensor(case["losses"], dtype=torch.float64)).tolist()


def _state_differences(inputs: Mapping[str, Any], case: Mapping[str, Any]) -> Iterator[str]:
    """What the states of the coupled losses computed, where the file tells."""
    extra = _extra(case)
    if case["loss"] == "bco":
        q = quantities(inputs, case)
        if "delta_exact_float64" in extra:
            yield from difference("delta", q.running_reward, extra["delta_exact_float64"], LOSS_TOLERANCE)
        if "delta" in extra and "losses" in case:  # with the program's own shift, to the full precision
            found = ours(case)(q._replace(running_reward=_tensor(extra["delta"])))
            yield from difference("losses at its delta", found, case["losses"], LOSS_TOLERANCE)
    if case["loss"] == "beta_dpo" and "gap_mean_after" in extra:
        state = _beta_state(case)
        state.before(quantities(inputs, case))
        after = [state.mean, state.deviation]
        yield from difference("running", after, [extra["gap_mean_after"], extra["gap_std_after"]], LOSS_TOLERANCE)


def difference(what: str, found: Any, expected: Any, tolerance: float) -> Iterator[str]:
    """A line where the largest difference, relative above one, is over the tolerance or no number."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach().flatten() for x in (found, expected))
    if a.shape != b.shape:
        yield f"{what}: {a.numel()} values, expected {b.numel()}"
        return
    worst = ((a - b).abs() / b.abs().clamp(min=1)).max().item() if len(a) else 0.0
    if math.isnan(worst) or worst > tolerance:
        yield f"{what}: largest difference {worst:.3g}, allowed {tolerance:.3g}"


def check_procedures(procedures: Mapping[str, Any]) -> Iterator[Finding]:
    """gamma-PO's margins and SPPO's win rates; the other procedures are no losses."""
    for i, case in enumerate(procedures.get("gamma_po_margins", {}).get("cases", [])):
        gaps = torch.tensor(case["reward_gaps"], dtype=torch.float64)
        found = coupling.gamma_margins(gaps, gaps[:0], gamma=case["gamma0"], tau=case["tau"])
        yield Finding(f"gamma_po_margins/{i}", [*difference("gamma", found, case["gamma_official"], LOSS_TOLERANCE)])
    if "sppo_probs" in procedures:
        case = procedures["sppo_probs"]
        probabilities = losses.preferences(torch.tensor(case["rm_scores"], dtype=torch.float64))
        rates, chosen, rejected = probabilities.mean(-1), case["chosen"], case["rejected"]
        found = [probabilities[chosen, rejected], rates[chosen], rates[rejected]]
        expected = [case[f"chosen_probs{suffix}"] for suffix in ("", "_win", "_lose")]
        yield Finding("sppo_probs", [*difference("probabilities", found, expected, LOSS_TOLERANCE)])


def check_token_level(level: Mapping[str, Any]) -> Iterator[Finding]:
    """The losses of the token-level section, from its log-probabilities; making those is not the losses' part."""
    expected = level.get("expected", {})
    if not {"sum_logps", "ref_sum_logps", "lengths"} <= set(expected):
        return
    beta, q = level["beta"], _token_quantities(expected, expected["sum_logps"], expected["ref_sum_logps"])
    functions = {
        "sigmoid": partial(losses.dpo, beta=beta),
        "sigmoid_norm": partial(losses.dpo_norm, beta=beta),
        "ipo": partial(losses.ipo, beta=beta),
        "sft": partial(losses.sft, nll="batch"),
    }
    for name, case in expected.get("dpo", {}).items():
        if name == "ld_dpo":  # DPO from log-probabilities that weigh the tail of the longer answer less
            weighed = _token_quantities(expected, case["policy_logps"], case["ref_logps"])
            found = losses.dpo(weighed, beta=beta)
        elif name in functions:
            found = functions[name](q)
        else:
            yield Finding(f"token_level/{name}", skipped="unknown loss")
            continue
        yield Finding(f"token_level/{name}", [*difference("losses", found, case["losses"], LOSS_TOLERANCE)])
    if {"wpo_mean_adj_logp", "wpo_weight"} <= set(expected):
        weights = losses.wpo_weights(q)
        yield Finding("token_level/wpo", [*difference("weights", weights, expected["wpo_weight"], LOSS_TOLERANCE)])
    if {"avg_logps", "nll_batch_token_mean_completion_only"} <= set(expected):
        nll = losses.orpo(q, odds_weight=0.0, nll="batch").mean()
        wanted = expected["nll_batch_token_mean_completion_only"]
        failures = [*difference("NLL", nll, wanted, LOSS_TOLERANCE)]
        failures += difference("means", torch.cat(q.means()), expected["avg_logps"], LOSS_TOLERANCE)
        yield Finding("token_level/orpo", failures)


def _token_quantities(expected: Mapping[str, Any], policy: list[float], reference: list[float]) -> Quantities:
    """The section's rows are the chosen answers, then the rejected ones."""
    halves = [half for x in (policy, reference, expected["lengths"]) for half in _leaf(x).detach().chunk(2)]
    concentration = _tensor(expected.get("wpo_mean_adj_logp"))
    chosen, rejected = (None, None) if concentration is None else concentration.chunk(2)
    return Quantities(*halves, chosen_concentration=chosen, rejected_concentration=rejected)


def check(vectors: Mapping[str, Any]) -> Iterator[Finding]:
    """Every case of a file."""
    for section in (vectors, vectors.get("edge_cases", {})):
        for case in section.get("cases", []):
            yield check_case(section.get("inputs", {}), case)
    yield from check_token_level(vectors.get("token_level", {}))
    yield from check_procedures(vectors.get("procedures", {}))


def main(path: str) -> int:
    """Print what failed or was skipped, then the counts."""
    findings = list(check(json.loads(Path(path).read_text(encoding="utf-8"))))
    for finding in findings:
        if finding.skipped:
            print(f"skipped {finding.name}: {finding.skipped}")
        for failure in finding.failures:
            print(f"FAILED {finding.name}: {failure}")
    failed = sum(bool(finding.failures) for finding in findings)
    skipped = sum(bool(finding.skipped) for finding in findings)
    print(f"{len(findings) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FILE")
    sys.exit(main(sys.argv[1]))
