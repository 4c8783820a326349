import torch

from autoprune.scoring import Evidence
from autoprune.scoring.random import Random
from autoprune.structure import Group, Structure, analyse
from autoprune.testing import TinyNet

STRUCTURE = Structure(tuple(Group(name, "channels", 50, (), (name,), ()) for name in ("a", "b")))


def score(seed, structure=STRUCTURE):
    return Random().score(TinyNet(), structure, Evidence([], torch.nn.CrossEntropyLoss(reduction="none"), seed))


def test_one_seed_gives_one_order():
    assert torch.equal(score(3)["a"], score(3)["a"])


def test_seeds_and_groups_differ():
    assert not torch.equal(score(3)["a"], score(4)["a"])
    assert not torch.equal(score(3)["a"], score(3)["b"])


def test_a_group_does_not_depend_on_the_others():
    assert torch.equal(score(3)["b"], score(3, Structure(STRUCTURE.groups[1:]))["b"])


def test_weights_have_one_each():
    structure = analyse(TinyNet(), torch.zeros(1, 1, 8, 8), kinds=("weights",))
    scores = score(3, structure)["fc:weights"]
    assert scores.shape == (10, 8)
    assert scores.unique().numel() == 80


def test_scores_are_in_the_unit_interval():
    assert all(0 <= value < 1 for value in score(0)["a"].tolist())
