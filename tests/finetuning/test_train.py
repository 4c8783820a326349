"""The one training loop: its learning rates, its arithmetic against a loop by hand, its randomness and its failures."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.errors import DivergedError
from autoprune.finetuning import Recipe, train
from autoprune.finetuning.train import one_cycle
from autoprune.task import cross_entropy

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

Batch = tuple[Tensor, Tensor]


def batches(count: int = 8, size: int = 5) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def network(dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, 3))


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


# -------------------------------------------------------------------------------------------------------- one cycle


@pytest.mark.parametrize(
    ("done", "warmup", "expected"),
    [
        (0.1, 0.2, 0.5),
        (0.2, 0.2, 1.0),
        (0.6, 0.2, 0.5005),
        (1.0, 0.2, 0.001),
        (1 / 3, 0.0, 0.001 + 0.999 * 0.75),
        (1.0, 1.0, 1.0),
    ],
)
def test_the_cycle_at_known_points(done: float, warmup: float, expected: float) -> None:
    assert one_cycle(done, warmup) == pytest.approx(expected, rel=1e-12)


@given(st.floats(0.001, 1.0), st.floats(0.001, 1.0), st.floats(0.0, 1.0))
def test_the_cycle_rises_to_its_peak_and_falls_from_it(a: float, b: float, warmup: float) -> None:
    low, high = sorted((a, b))
    early, late = one_cycle(low, warmup), one_cycle(high, warmup)
    assert 0 < early <= 1
    assert 0 < late <= 1
    if high <= warmup:
        assert early <= late
    if low > warmup:
        assert early >= late


# --------------------------------------------------------------------------------------------------------- training


def test_the_result_is_that_of_a_loop_by_hand() -> None:
    """Nesterov momentum and weight decay, written out."""
    recipe = Recipe(lr=0.3, momentum=0.8, weight_decay=0.01, warmup=0.25)
    trained, by_hand = network(), network()
    train(trained, batches(), 6, recipe=recipe, loss=cross_entropy, seed=0)
    momenta = [torch.zeros_like(p) for p in by_hand.parameters()]
    rates = [one_cycle((step + 1) / 6, 0.25) * 0.3 for step in range(6)]
    for rate, (inputs, targets) in zip(rates, batches(), strict=False):
        loss = cross_entropy(by_hand(inputs), targets).sum() / len(targets)
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient, momentum in zip(by_hand.parameters(), gradients, momenta, strict=True):
                decayed = gradient + 0.01 * parameter
                momentum.mul_(0.8).add_(decayed)
                parameter -= rate * (decayed + 0.8 * momentum)
    for ours, theirs in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_momentum_zero_is_plain_gradient_descent() -> None:
    trained, by_hand = network(), network()
    train(trained, batches(), 1, recipe=Recipe(0.1, 0.0, 0.0, warmup=1.0), loss=cross_entropy, seed=0)
    inputs, targets = next(batches())
    cross_entropy(by_hand(inputs), targets).mean().backward()
    for ours, theirs in zip(trained.parameters(), by_hand.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)


def test_it_leaves_eval_mode_and_takes_just_the_steps_asked_for() -> None:
    model, stream, seen = network().train(), batches(8), list[tuple[int, float]]()
    train(model, stream, 3, recipe=Recipe(), loss=cross_entropy, seed=0, progress=lambda *said: seen.append(said))
    assert not any(module.training for module in model.modules())
    assert len(list(stream)) == 5
    assert [step for step, _ in seen] == [1, 2, 3]
    assert all(math.isfinite(value) for _, value in seen)


def test_no_batch_is_read_beyond_the_last_step() -> None:
    read = []

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in range(9):
            read.append(number)
            yield torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)

    with torch.random.fork_rng(devices=[]):
        model = nn.Linear(3, 2)
    train(model, batches(), 4, recipe=Recipe(), loss=cross_entropy, seed=0)
    assert read == [0, 1, 2, 3]


def test_no_steps_and_frozen_weights_change_nothing() -> None:
    model = network().train()
    before = weights(model)
    train(model, iter(()), 0, recipe=Recipe(), loss=cross_entropy, seed=0)
    assert not model.training
    frozen = network()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    train(frozen, batches(), 3, recipe=Recipe(), loss=cross_entropy, seed=0)
    for after in (weights(model), weights(frozen)):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_frozen_layer_stays_and_the_others_learn() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = weights(model)
    train(model, batches(), 3, recipe=Recipe(), loss=cross_entropy, seed=0)
    same = [torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
    assert same == [True, True, False, False]


def test_it_trains_where_gradients_are_off() -> None:
    model = network()
    before = weights(model)
    with torch.no_grad():
        train(model, batches(), 1, recipe=Recipe(), loss=cross_entropy, seed=0)
    assert not torch.equal(before[0], weights(model)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_it_with_the_step(bad: float) -> None:
    def spoiled() -> Iterator[Batch]:
        for number, (inputs, targets) in enumerate(batches()):
            yield inputs * (bad if number == 2 else 1.0), targets

    with pytest.raises(DivergedError, match=r"^the loss is nan at fine-tuning step 3 of 5$"):
        train(network(), spoiled(), 5, recipe=Recipe(), loss=cross_entropy, seed=0)


def test_dropout_is_drawn_from_the_seed_alone() -> None:
    def trained(seed: int) -> Tensor:
        model = network(dropout=0.5)
        train(model, batches(), 4, recipe=Recipe(lr=0.5), loss=cross_entropy, seed=seed)
        return model[0].weight.detach()

    assert torch.equal(trained(5), trained(5))
    assert not torch.equal(trained(5), trained(6))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 8))
def test_learning_rates_follow_the_cycle(steps: int) -> None:
    """With one weight of constant gradient 1, each step moves it by the rate."""
    model = nn.utils.skip_init(nn.Linear, 1, 1, bias=False)
    model.weight.data.fill_(0.0)
    path = [0.0]
    train(
        model,
        ((torch.ones(2, 1), torch.zeros(2)) for _ in range(steps)),
        steps,
        recipe=Recipe(lr=0.5, momentum=0.0, weight_decay=0.0),
        loss=lambda outputs, _: outputs[:, 0],
        seed=0,
        progress=lambda *_: path.append(-model.weight.item()),
    )
    moved = [after - before for before, after in itertools.pairwise(path)]
    assert moved == pytest.approx([0.5 * one_cycle((step + 1) / steps, 0.2) for step in range(steps)], abs=1e-6)
