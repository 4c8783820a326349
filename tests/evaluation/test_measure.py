"""One pass over a split: every sample counts once, and errors are those of the textbook."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.evaluation import Samples, measure
from autoprune.task import cross_entropy, top1

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def first_targets_right(n: int, right: int) -> tuple[Tensor, Tensor]:
    """Scores that are right on the first samples and wrong on the others, as inputs of an identity network."""
    outputs = torch.zeros(n, 2)
    outputs[:right, 0] = 1.0
    outputs[right:, 1] = 1.0
    return outputs, torch.zeros(n, dtype=torch.int64)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 17))
def test_a_short_last_batch_counts_by_its_samples(n: int, right: int, batch_size: int) -> None:
    """The mean of batch means would weigh the samples of a short last batch more than the others."""
    right = min(right, n)
    inputs, targets = first_targets_right(n, right)
    batches = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    measured = measure(nn.Identity(), batches, top1, cross_entropy)
    assert measured.scores.shape == measured.losses.shape == (n,)
    assert measured.summary("full").accuracy == pytest.approx(right / n, abs=1e-12)
    expected = torch.nn.functional.cross_entropy(inputs.double(), targets)
    assert measured.summary("full").loss == pytest.approx(float(expected), rel=1e-6)


def test_the_mean_of_batch_means_would_be_wrong_here() -> None:
    inputs, targets = first_targets_right(5, 4)
    batches = list(zip(inputs.split(4), targets.split(4), strict=True))
    means = [float(top1(x, y).mean()) for x, y in batches]
    assert sum(means) / len(means) == 0.5
    assert measure(nn.Identity(), batches, top1, cross_entropy).summary("full").accuracy == pytest.approx(0.8)


def test_standard_errors_are_those_of_a_mean() -> None:
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    losses = torch.tensor([0.0, 2.0, 4.0, 6.0], dtype=torch.float64)
    summary = Samples(scores, losses).summary("short")
    assert summary.fidelity == "short"
    assert summary.accuracy_se == pytest.approx(math.sqrt((3 * 0.0625 + 0.5625) / 3 / 4))
    assert summary.loss_se == pytest.approx(math.sqrt(20 / 3 / 4))


def test_one_sample_has_no_error() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert math.isnan(Samples(one, one).summary("short").accuracy_se)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_a_drop_is_judged_in_pairs(pairs: list[tuple[bool, bool]]) -> None:
    dense = Samples(torch.tensor([float(a) for a, _ in pairs]).double(), torch.zeros(len(pairs)).double())
    pruned = Samples(torch.tensor([float(b) for _, b in pairs]).double(), torch.zeros(len(pairs)).double())
    drops = [float(a) - float(b) for a, b in pairs]
    mean = sum(drops) / len(drops)
    variance = sum((d - mean) ** 2 for d in drops) / (len(drops) - 1)
    assert pruned.drop_error(dense) == pytest.approx(math.sqrt(variance / len(drops)), abs=1e-9)
    assert dense.drop_error(dense) == 0


def test_a_paired_error_is_smaller_than_that_of_two_samples() -> None:
    hard = torch.arange(100) < 30  # both fail here
    dense = Samples(1.0 - hard.double(), torch.zeros(100).double())
    scores = dense.scores.clone()
    scores[-3:] = 0.0
    pruned = Samples(scores, torch.zeros(100).double())
    apart = math.hypot(dense.summary("").accuracy_se, pruned.summary("").accuracy_se)
    assert 0 < pruned.drop_error(dense) < apart / 2


class Recorder(nn.Module):
    """Notes its mode and whether gradients are on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.seen: list[tuple[bool, bool, bool]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append((self.training, self.norm.training, torch.is_grad_enabled()))
        return self.norm(inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("outer", "inner"), [(True, True), (True, False), (False, True)])
def test_it_runs_in_eval_mode_without_gradients_and_restores_every_mode(outer: bool, inner: bool) -> None:
    model = Recorder()
    model.training, model.norm.training = outer, inner
    inputs, targets = first_targets_right(6, 3)
    mean = model.norm.running_mean.clone() if model.norm.running_mean is not None else None
    measured = measure(model, [(inputs, targets)], top1, cross_entropy)
    assert model.seen == [(False, False, False)]
    assert (model.training, model.norm.training) == (outer, inner)
    assert mean is not None
    assert torch.equal(mean, model.norm.running_mean)  # type: ignore[arg-type]
    assert measured.scores.dtype == measured.losses.dtype == torch.float64


def test_twins_take_batches_in_turn_and_samples_stay_in_order() -> None:
    class Counts(nn.Identity):
        """Says which batches it had; each waits for the other's first."""

        def __init__(self) -> None:
            super().__init__()
            self.had = 0

        def forward(self, x: Tensor) -> Tensor:
            self.had += 1
            if self.had == 1:
                both.wait()
            return x

    both = threading.Barrier(2, timeout=60)
    inputs = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(30) % 4
    batches = [*zip(inputs.split(4), targets.split(4), strict=True)]
    one, other = Counts(), Counts()
    found = measure(one, batches, top1, cross_entropy, twins=[other])
    assert one.had + other.had == len(batches)
    expected = measure(nn.Identity(), batches, top1, cross_entropy)
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.scores, expected.scores)
    assert one.training
    assert other.training


def test_an_error_in_a_twin_is_raised() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("twin")

    batches = [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))] * 20
    with pytest.raises(KeyError, match="twin"):
        measure(Fails(), batches, top1, cross_entropy, twins=[Fails()])
