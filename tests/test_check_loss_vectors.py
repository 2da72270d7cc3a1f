"""The check of a file of reference values: passes on the shared one, and on nothing that differs from it."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import check_loss_vectors

DATA = Path(__file__).parent / "data" / "loss_vectors.json"
VECTORS = json.loads(DATA.read_text())
COUPLED = ("gamma_", "beta_dpo", "kto", "bco", "aot")


def _only(loss, /, **changes):
    case = next(case for case in VECTORS["cases"] if case["loss"] == loss)
    return {"inputs": VECTORS["inputs"], "cases": [copy.deepcopy(case) | changes]}


def _check(vectors, tmp_path, capsys):
    path = tmp_path / "vectors.json"
    path.write_text(json.dumps(vectors))
    status = check_loss_vectors.main(str(path))
    return status, capsys.readouterr().out.splitlines()


def test_the_shared_file_passes_whole():
    script = Path(check_loss_vectors.__file__)
    done = subprocess.run([sys.executable, script, DATA], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "102 passed, 0 failed, 0 skipped\n"), done.stderr


@pytest.mark.parametrize("loss", sorted({case["loss"] for case in VECTORS["cases"]}))
def test_changed_values_fail(loss, tmp_path, capsys):
    keys = ("losses", "grad_policy_chosen_logps", "grad_policy_rejected_logps")
    vectors = _only(loss)
    case = vectors["cases"][0]
    changed = case.get("extra", {}).get("selected_index", [0])[0]  # beta-DPO has no loss of a pair it leaves out
    for key in keys:
        case[key][changed] += 1e-5 * max(1.0, abs(case[key][changed]))
    status, lines = _check(vectors, tmp_path, capsys)
    assert (status, lines[-1]) == (1, "0 passed, 1 failed, 0 skipped")
    for key in keys:
        assert any(line.startswith(f"FAILED {case['id']}: {key}: largest difference") for line in lines), key


def test_a_case_without_losses_is_held_to_what_it_has(tmp_path, capsys):
    vectors = _only("hinge")
    case = vectors["cases"][0]
    del case["losses"]
    assert _check(vectors, tmp_path, capsys) == (0, ["1 passed, 0 failed, 0 skipped"])
    case["loss_mean"] += 1e-5
    assert _check(vectors, tmp_path, capsys)[0] == 1
    del case["loss_mean"]
    status, lines = _check(vectors, tmp_path, capsys)
    assert (status, lines[-1]) == (0, "0 passed, 0 failed, 1 skipped")
    assert "neither 'losses' nor 'loss_mean'" in lines[0]


def test_nan_fails(tmp_path, capsys):
    status, lines = _check(_only("hinge", losses=[float("nan")] * 8), tmp_path, capsys)
    assert (status, lines[-1]) == (1, "0 passed, 1 failed, 0 skipped")


@pytest.mark.parametrize("loss", sorted(check_loss_vectors.KNOWN))
def test_a_parameter_that_a_loss_does_not_have_skips_the_case(loss, tmp_path, capsys):
    case = {"id": "x", "loss": loss, "params": {"beta": 0.1, "surprise": 1.0}, "losses": []}
    status, lines = _check({"inputs": VECTORS["inputs"], "cases": [case]}, tmp_path, capsys)
    assert (status, lines[-1]) == (0, "0 passed, 0 failed, 1 skipped")
    assert lines[0].startswith("skipped x: parameters")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss": "dpo_2030"}, "unknown loss 'dpo_2030'"),
        ({"reduction": "median"}, "reduction 'median'"),
    ],
)
def test_what_is_not_known_is_named_and_skipped(changes, says, tmp_path, capsys):
    status, lines = _check(_only("hinge", **changes), tmp_path, capsys)
    assert (status, lines) == (0, [f"skipped hinge/beta=0.1: {says}", "0 passed, 0 failed, 1 skipped"])


def test_an_input_that_is_missing_skips_the_case(tmp_path, capsys):
    vectors = _only("mrpo")
    vectors["inputs"] = {k: v for k, v in vectors["inputs"].items() if not k.startswith("ref1")}
    _, lines = _check(vectors, tmp_path, capsys)
    assert lines[-1] == "0 passed, 0 failed, 1 skipped"
    assert "needs a second reference" in lines[0]


def test_names_and_order_of_the_cases_do_not_matter(tmp_path, capsys):
    cases = [{k: v for k, v in case.items() if k != "id"} for case in reversed(VECTORS["cases"])]
    status, lines = _check({"inputs": VECTORS["inputs"], "cases": cases}, tmp_path, capsys)
    assert (status, lines) == (0, [f"{len(cases)} passed, 0 failed, 0 skipped"])


def test_a_file_of_other_pairs_passes(tmp_path, capsys):
    """Five of the pairs, in another order; a loss that couples none then has the same values and larger gradients."""
    kept = [6, 0, 3, 7, 2]
    inputs = {k: [v[i] for i in kept] for k, v in VECTORS["inputs"].items() if isinstance(v, list) and len(v) == 8}
    cases = []
    for case in VECTORS["cases"]:
        if case["loss"].startswith(COUPLED) or case["params"].get("nll") == "batch_token_mean":
            continue
        scale = 1.0 if case["reduction"] == "sum" else 8 / 5
        losses = [case["losses"][i] for i in kept]
        gradients = {k: [v[i] * scale for i in kept] for k, v in case.items() if k.startswith("grad_")}
        mean = sum(losses) / (1 if case["reduction"] == "sum" else 5)
        cases.append(case | gradients | {"losses": losses, "loss_mean": mean})
    status, lines = _check({"inputs": inputs, "cases": cases}, tmp_path, capsys)
    assert len(cases) > 40
    assert (status, lines) == (0, [f"{len(cases)} passed, 0 failed, 0 skipped"])


def test_an_empty_file_passes_nothing(tmp_path, capsys):
    assert _check({}, tmp_path, capsys) == (0, ["0 passed, 0 failed, 0 skipped"])
