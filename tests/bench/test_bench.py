"""The bench at tiny sizes: both trainers see the same log-probs, loss and gradient. Nothing is said about time."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from selfimprove.training.job import Tree
from selfimprove.training.packing import trees_of
from tests.bench import bound, memory, workload
from tests.bench.apart import Worker
from tests.bench.measure import Baseline, baselines, best_batch, compare
from tests.bench.train import HEAD, line


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workers():
    with Worker(keeps_heap=False) as theirs, Worker(keeps_heap=True) as ours:
        yield theirs, ours


@pytest.mark.parametrize("baseline", baselines(workload.tiny(97), every=True), ids=lambda b: b.name)
def test_both_trainers_see_the_same_numbers(baseline, workers):
    result = compare(workload.tiny(97), baseline, 1, *workers)
    assert result.max_logp_diff < 1e-4
    assert 0 < result.grad_rel_diff < 1e-4
    assert result.loss_diff < 1e-5
    entry = result.entry()
    assert set(entry) == {"vocab", "baseline", "ratio", "max_logp_diff", "grad_rel_diff", "peak_share"}
    assert set(entry["ratio"]) == {"min", "median", "max"}
    assert entry["ratio"]["median"] > 0
    assert 0 < min(result.shares_of_best) <= min(result.shares)
    assert line(result).count("|") == HEAD.splitlines()[0].count("|")


def test_the_best_batch_is_the_one_where_trl_comes_closest(workers):
    done = compare(workload.tiny(97), Baseline("trl precomputed"), 1, *workers)
    other = done._replace(baseline=Baseline("trl batch 1", device_batch=1), ratios=[done.ratios[0] / 2])
    best = best_batch([done, other])
    assert best.baseline.name == "trl best batch (1)"
    assert best.ratios == other.ratios
    assert best_batch([done]) is None


def test_memory_is_measured_in_a_process_of_its_own():
    peak = memory.measure("ours", workload.tiny(97), pairs=2)
    assert 0 < peak.before <= peak.peak


def test_flops_count_each_distinct_token_once():
    setting = workload.tiny(97)
    tree = Tree([5, 6, 7], [[8, 1], [9, 1]])
    layer = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    seen = (1 + 2 + 3) + 4 + 4  # the prompt's tokens, and one fed token of each response
    forward = 2 * layer * 5 + 2 * 4 * 32 * seen + 2 * 32 * 97 * 4
    assert math.isclose(workload.needed_flops(setting, [tree]), 3 * forward)


def test_the_bound_runs_the_products_of_a_step_and_no_others():
    setting = workload.tiny(97)
    tree = Tree([5, 6, 7], [[8, 1], [9, 1]])
    with FlopCounterMode(display=False) as counted:
        bound.products(setting, *bound.weights_of(setting), tokens=5, scored=4)
    seen = (1 + 2 + 3) + 4 + 4
    assert counted.get_total_flops() == workload.needed_flops(setting, [tree]) - 3 * 2 * 4 * 32 * seen
    shares, alone = bound.share(setting, repeats=2, budget=setting.tokens)
    assert len(shares) == len(alone) == 2
    assert all(share > 0 for share in [*shares, *alone])


def test_the_peak_is_the_best_products_average_over_both_sides_of_a_step():
    assert workload.peak_flops([60.0, 70.0, 50.0], [80.0, 50.0, 56.0]) == 70.0


def test_all_pairs_of_four_responses_make_one_tree():
    trees = workload.trees(workload.tiny(97), 2, 4)
    rows = workload.all_pairs(trees)
    assert len(rows) == 12
    assert trees_of(rows).trees == trees
