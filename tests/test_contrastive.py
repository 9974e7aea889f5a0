"""The contrastive loss on cases worked by hand."""

import math

import torch

from taskspec.model.contrastive import allowed_passages, contrastive_loss


def test_passages_of_gold_pages_are_masked_except_the_positive():
    # query 0: gold pages 7 and 8, positive is passage 0; query 1: gold page 9, positive is passage 1
    gold = torch.tensor([[7, 8], [9, -1]])
    pages = torch.tensor([7, 9, 7, 8, 5, -1])
    allowed = allowed_passages(gold, torch.tensor([0, 1]), pages)
    assert allowed.tolist() == [
        [True, True, False, False, True, False],
        [True, True, True, True, True, False],
    ]


def test_another_query_with_the_same_gold_page_gives_no_false_negative():
    allowed = allowed_passages(torch.tensor([[4], [4]]), torch.tensor([0, 1]), torch.tensor([4, 4, 2]))
    assert allowed.tolist() == [[True, False, True], [False, True, True]]


def test_loss_by_hand():
    query = torch.tensor([[1.0, 0.0]])
    passage = torch.tensor([[2.0, 0.0], [1.0, 5.0], [9.0, 9.0]])
    allowed = torch.tensor([[True, True, False]])
    loss, correct = contrastive_loss(query, passage, torch.tensor([0]), allowed, temperature=0.5)
    assert math.isclose(loss.item(), math.log(math.exp(4) + math.exp(2)) - 4, rel_tol=1e-5)
    assert correct.tolist() == [True]


def test_a_tie_with_a_negative_is_not_correct():
    same = torch.ones(1, 2)
    _, correct = contrastive_loss(same, torch.ones(2, 2), torch.tensor([0]), torch.ones(1, 2, dtype=torch.bool), 1.0)
    assert correct.tolist() == [False]


def test_masked_passages_get_no_gradient():
    passage = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    allowed = torch.tensor([[True, True, False]])
    loss, _ = contrastive_loss(torch.ones(1, 4), passage, torch.tensor([0]), allowed, 1.0)
    loss.sum().backward()
    assert passage.grad is not None
    assert passage.grad[2].abs().sum() == 0
    assert passage.grad[:2].abs().sum() > 0
