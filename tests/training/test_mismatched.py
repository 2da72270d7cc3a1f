"""KTO's answers under other prompts are other prompts' answers, however many pairs a prompt has."""

import torch

from selfimprove.training import coupling
from selfimprove.training.coupling import Quantities
from selfimprove.training.job import PairRow
from selfimprove.training.learner import lay_out


def pairs(*prompts):
    return [PairRow(f"{n}", [p, p], [p, 100 + n], [p, 200 + n]) for n, p in enumerate(prompts)]


def mismatched(rows):
    batch = lay_out(rows, mismatched=True)
    trees = dict(zip(batch.first, batch.trees, strict=True))
    return [(trees[n].prompt_ids, trees[n].responses) for n in batch.mismatched]


def test_no_prompt_meets_an_answer_of_its_own():
    rows = pairs(1, 1, 2, 2, 3)
    found = mismatched(rows)
    assert [prompt for prompt, _ in found] == [row.prompt_ids for row in rows]
    assert [answer for _, [answer] in found] == [rows[n].chosen_ids for n in (2, 2, 4, 4, 0)]


def test_a_batch_of_one_prompt_has_none_and_its_shift_is_zero():
    assert mismatched(pairs(1, 1, 1)) == mismatched(pairs(1)) == []

    def one(value):
        return torch.tensor([value], dtype=torch.float64)

    empty = torch.zeros(0, dtype=torch.float64)
    q = Quantities(one(-3.0), one(-5.0), one(-4.0), one(-4.5), one(2.0), one(2.0))
    q = q._replace(mismatched_policy_logps=empty, mismatched_reference_logps=empty)
    expected = torch.sigmoid(torch.tensor([-0.1 * 1.0, 0.1 * -0.5], dtype=torch.float64))
    assert torch.allclose(coupling.kto(q), expected, atol=1e-12)
