import pytest
import torch
from torch import nn

from autoprune.errors import ConfigError
from autoprune.policy import Policy
from autoprune.scoring import Evidence
from autoprune.scoring.allocation import blocks_below
from autoprune.scoring.identity import Identity, function_norms
from autoprune.scoring.l1 import L1
from autoprune.structure import Structure, analyse


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.fc.weight)
        with torch.no_grad():
            self.fc.weight.mul_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(x)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), Block(0.5), Block(2.0), nn.Linear(4, 3))


def found(model: nn.Module) -> Structure:
    return analyse(model, torch.randn(1, 4), kinds=("channels", "blocks"))


EVIDENCE = Evidence([(torch.randn(5, 4), torch.zeros(5)), (torch.randn(2, 4), torch.zeros(2))], nn.MSELoss(), 0)


def test_a_function_norm_is_what_a_block_adds_relative_to_its_input() -> None:
    model = net()
    norms = function_norms(model, found(model), EVIDENCE, spectral=False)
    assert {name: pytest.approx(float(score)) for name, score in norms.items()} == {"1": 0.5, "2": 2.0}
    assert torch.equal(model[1].fc.weight, torch.eye(4) / 2)


def test_spectral_normalisation_takes_the_scale_away() -> None:
    model = net()
    norms = function_norms(model, found(model), EVIDENCE)
    assert {name: pytest.approx(float(score)) for name, score in norms.items()} == {"1": 1.0, "2": 1.0}


def test_all_but_blocks_is_scored_as_by_l1() -> None:
    model = net()
    structure = found(model)
    scores, by_l1 = (criterion.score(model, structure, EVIDENCE) for criterion in (Identity(), L1()))
    assert [group.kind for group in structure].count("blocks") == 2
    for group in structure:
        assert scores[group.name].shape == (group.size,)
        assert torch.equal(scores[group.name], by_l1[group.name]) == (group.kind != "blocks")


def test_the_blocks_of_the_lowest_scores_go() -> None:
    scores = {"a": torch.tensor([2.0]), "b": torch.tensor([0.5]), "c": torch.tensor([1.0])}
    assert blocks_below(scores, 2) == Policy({"a": 0.0, "b": 1.0, "c": 1.0})
    assert blocks_below(scores, 0) == Policy({"a": 0.0, "b": 0.0, "c": 0.0})


@pytest.mark.parametrize("number", [-1, 4])
def test_more_blocks_than_there_are_is_refused(number: int) -> None:
    with pytest.raises(ConfigError, match=rf"^`0 <= number <= 3` must hold, but got number={number}$"):
        blocks_below(dict.fromkeys("abc", torch.zeros(1)), number)
