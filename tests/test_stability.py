"""Small tasks: a planted noisy one is found out layer by layer, and shrinkage takes off its noise and nobody else's."""

import pytest
import torch
from torch import nn

from taskspec.sections import Specialization
from taskspec.specialize.distribution import Share
from taskspec.specialize.gradients import FlatParameters, Piece
from taskspec.specialize.methods import Taco
from taskspec.specialize.rows import Rows
from taskspec.specialize.stability import Stability

ROWS = 400
NOISE = (0.05, 0.05, 0.7)
"""Of each task's sensitivities from step to step, in shares of them: the third task has few queries."""


def pieces() -> list[Piece]:
    half = ROWS // 2
    return [Piece(f"encoder.block.{n}.weight", (half, 3), 3 * half * n) for n in range(2)]


def rows() -> Rows:
    return Rows(pieces(), slice(0, 3 * ROWS), torch.device("cpu"))


@pytest.fixture
def planted():
    """What each task truly needs (T, R), and the noisy measurements of forty steps."""
    generator = torch.Generator().manual_seed(0)
    need_TR = 1 + torch.rand(3, ROWS, generator=generator)
    steps = []
    for _ in range(40):
        noise_TR = torch.randn(3, ROWS, generator=generator) * torch.tensor(NOISE)[:, None]
        steps.append(need_TR * noise_TR.exp() / torch.tensor(NOISE)[:, None].square().div(2).exp())
    return need_TR, steps


def test_the_noisy_task_has_the_larger_error_and_the_smaller_sample(planted):
    need_TR, steps = planted
    stability = Stability(3, rows(), need_TR)
    for step in steps:
        stability.add(step, torch.ones(3, dtype=torch.int64))
    for layer in ("encoder 0", "encoder 1"):
        first, second, noisy = (task[layer] for task in stability.estimates())
        rough = need_TR[0].square().mean().sqrt()
        assert first.standard_error == pytest.approx(float(0.05 * rough), rel=0.2)
        assert noisy.standard_error > 10 * first.standard_error
        assert first.sample_size > 200
        assert noisy.sample_size < 2
        assert first.reliability > 0.9
        assert second.reliability > 0.9
        assert noisy.reliability < 0.3


def test_shrinkage_takes_off_most_of_the_noise_and_leaves_the_others(planted):
    need_TR, steps = planted
    stability = Stability(3, rows(), need_TR)
    assert torch.equal(stability.shrink(2, steps[0][2]), steps[0][2]), "nothing is known yet"
    for step in steps[:-1]:
        stability.add(step, torch.ones(3, dtype=torch.int64))
    before = [float((steps[-1][task] - need_TR[task]).norm()) for task in range(3)]
    after = [float((stability.shrink(task, steps[-1][task]) - need_TR[task]).norm()) for task in range(3)]
    assert after[2] < 0.35 * before[2]
    for task in (0, 1):
        assert after[task] < 1.15 * before[task]


def test_a_task_without_a_gradient_says_nothing_about_itself(planted):
    _, steps = planted
    all_of, some = Stability(3, rows(), torch.empty(0)), Stability(3, rows(), torch.empty(0))
    there = torch.tensor([1, 1, 0])
    for number, step in enumerate(steps):
        all_of.add(step, torch.ones(3, dtype=torch.int64))
        some.add(step * there[:, None] if number % 2 else step, there if number % 2 else torch.ones_like(there))
    assert some.updates_T.tolist() == [len(steps), len(steps), (len(steps) + 1) // 2]
    for found, expected in zip(some.state().values(), all_of.state().values(), strict=True):
        torch.testing.assert_close(found[:2], expected[:2])
    for steady, rare in zip(*(one.estimates()[2].values() for one in (all_of, some)), strict=True):
        assert 0.5 < rare.standard_error / steady.standard_error < 1.5
        assert 0.5 < rare.reliability / steady.reliability < 2


def test_with_shrinkage_noise_owns_no_rows_and_more_rows_lean_to_whom_they_should(planted):
    need_TR, steps = planted
    owner_R = need_TR.argmax(dim=0)
    wrong, right = {}, {}
    for shrinkage in (False, True):
        config = Specialization(warmup=0.0, min_warmup_steps=0, shrinkage=shrinkage)
        theta_P = torch.ones(3 * ROWS)
        taco = Taco(config, 3, theta_P, Share(slice(0, len(theta_P)), rows()), steps=40)
        for step in steps:
            for task, need_R in enumerate(step):
                taco.add(task, need_R.repeat_interleave(3))
            taco.update(torch.ones(3), describe=False)
            weight_TR = torch.softmax(taco._logits(slice(None)), dim=0)
            taco.accept()
        wrong[shrinkage] = float(((weight_TR[2] > 0.5) & (owner_R != 2)).double().mean())
        right[shrinkage] = float((weight_TR.argmax(dim=0) == owner_R).double().mean())
    assert wrong[False] > 0.1
    assert wrong[True] < 0.01
    assert right[True] > right[False] + 0.1


class Planted(nn.Module):
    """Three blocks, of which each task uses one, behind a layer that all use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def loss(self, task: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(16, 8, generator=generator)
        return (self.blocks[task](self.shared(x).tanh()) - x.roll(task, 1)).square().mean()


def test_planted_blocks_are_attributed_to_the_only_task_that_uses_them():
    module = Planted()
    flat = FlatParameters(module)
    whole = slice(0, len(flat.theta_P))
    config = Specialization(strength=4.0, warmup=0.0, min_warmup_steps=0)
    share = Share(whole, Rows(flat.pieces, whole, torch.device("cpu")))
    taco = Taco(config, 3, flat.theta_P, share, steps=20)
    grad_P = torch.zeros_like(flat.theta_P)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        for task in range(3):
            flat.collect_gradients_in(grad_P)
            module.loss(task, generator).backward()
            taco.add(task, grad_P)
        update = taco.update(torch.ones(3), describe=True)
        weight_TR = torch.softmax(taco._logits(slice(None)), dim=0)
        taco.accept()
        flat.theta_P -= 0.1 * update.grad_P
    row_P = torch.arange(share.rows.rows).repeat_interleave(share.rows.width_R)
    owner_P, lean_P = weight_TR.max(dim=0).indices[row_P], weight_TR.max(dim=0).values[row_P]
    right = [
        (owner_P[piece.elements] == int(piece.name.split(".")[1])) & (lean_P[piece.elements] > 0.5)
        for piece in flat.pieces
        if piece.name.startswith("blocks")
    ]
    assert torch.cat(right).double().mean() >= 0.95
    shared = [lean_P[piece.elements] for piece in flat.pieces if piece.name.startswith("shared")]
    assert torch.cat(shared).mean() < 0.8
