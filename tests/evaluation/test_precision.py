"""In which precision candidates run: the choice by a clock of our own, networks that rounding changes, what follows."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.cost import Cost
from autoprune.errors import RunError
from autoprune.evaluation import (
    Candidate,
    Choice,
    Evaluator,
    Ledger,
    Pipeline,
    Precision,
    Recovery,
    Workbench,
    chosen,
    measure,
    precision,
)
from autoprune.evaluation.precision import Trial, choose
from autoprune.finetuning import Recipe
from autoprune.policy import Policy
from autoprune.result import rebuild
from autoprune.task import Task, cross_entropy, top1

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

PLAIN, LAST, HALF = Precision(), Precision("float32", True), Precision("bfloat16", True)


def clock(*seconds: float) -> Callable[[], float]:
    """Return a clock by which what is timed takes these seconds, one after the other."""

    def ticks() -> Iterator[float]:
        now = 0.0
        for duration in seconds:
            yield now
            now += duration
            yield now

    times = ticks()
    return lambda: next(times)


def timed(plain: float, last: float, half: float, *training: float) -> Callable[[], float]:
    """Return a clock for passes (over a part, then two over all) and then three training steps, all taking turns."""
    passes = [share * whole for share in (PART, 1, 1) for whole in (plain, last, half)]
    return clock(*passes, *training * 3)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make()


def convolutional(*more: nn.Module) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *more, nn.Flatten(), nn.Linear(4 * 36, 4)))


PART = 3 / 20  # an eighth of the images, rounded up
IMAGES = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(20) % 4


def cost(macs: int, activations: int = 1000) -> Cost:
    return Cost(macs=macs, params=1, bytes=4, activations=activations, nonzero_params=1, nonzero_macs=1)


def choice(times: Callable[[], float], model: nn.Module | None = None) -> Choice:
    return choose(convolutional() if model is None else model, IMAGES, CLASSES, top1, cross_entropy, clock=times)


class TestChoice:
    def test_the_fastest_that_agrees(self):
        found = choice(timed(4.0, 2.0, 1.0, 6.0, 3.0))
        assert (found.precision, found.training) == (HALF, HALF)
        assert [(t.precision, t.seconds, t.training) for t in found.trials] == [
            (PLAIN, 200.0, 0.0),
            (LAST, 100.0, 300.0),
            (HALF, 50.0, 150.0),
        ]

    @pytest.mark.parametrize(
        ("times", "expected"),
        [
            (timed(4.0, 2.0, 1.7, 6.0, 6.0), LAST),  # hardly faster
            (timed(2.0, 4.0, 1.7, 6.0), PLAIN),
            (timed(2.0, 4.0, 1.5, 6.0, 6.0), HALF),
            (timed(1.0, 1.0, 3.0, 6.0), PLAIN),
        ],
    )
    def test_no_rounding_for_a_gain_within_the_noise(self, times, expected):
        assert choice(times).precision == expected

    def test_all_take_turns_and_the_shortest_pass_of_each_counts(self):
        """A machine that is busy in the first round slows down all of them, and each is taken from the second."""
        busy, quiet = [40.0, 20.0, 30.0], [4.0, 2.0, 3.0]
        found = choice(clock(*(PART * each for each in quiet), *busy, *quiet, *[6.0] * 6))
        assert [trial.seconds for trial in found.trials] == [200.0, 100.0, 150.0]
        assert found.precision == LAST
        training = [9.0, 9.0, 90.0, 3.0, 4.0, 50.0]  # one warms up, then two rounds
        found = choice(clock(*(PART * each for each in quiet), *quiet, *quiet, *training))
        assert [trial.training for trial in found.trials] == [0.0, 200.0, 150.0]

    @pytest.mark.parametrize(("off", "expected"), [(3e-5, LAST), (3e-4, PLAIN)])
    def test_float32_in_another_layout_must_give_the_same_numbers(self, off: float, expected: Precision):
        """A tolerance of one in ten thousand of the largest output, which rounding is far below."""

        class Off(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                wrong = x.dtype == torch.float32 and not x.is_contiguous()
                return x * (1 + off if wrong else 1.0)

        found = choice(timed(4.0, 2.0, 1.9, 6.0, 6.0), convolutional(Off()))
        assert found.precision == expected
        assert (found.trials[1].differs > 0.01) == (expected == PLAIN)

    def test_a_layout_that_is_wrong_in_float32_is_not_taken_in_bfloat16(self):
        class Off(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x if x.is_contiguous() or x.dtype != torch.float32 else -x

        found = choice(timed(4.0, 2.0, 1.0, 6.0), convolutional(Off()))
        assert (found.precision, found.training) == (PLAIN, PLAIN)
        assert found.trials[2].differs == 0.0

    def test_training_is_chosen_for_itself(self):
        found = choice(timed(4.0, 4.0, 1.0, 1.0, 2.0))
        assert (found.precision, found.training) == (HALF, LAST)

    def test_what_is_hopeless_on_a_part_is_tried_no_further(self):
        found = choice(clock(*(PART * each for each in (2.0, 1.0, 3.1)), 2.0, 1.0, 2.0, 1.0, 6.0, 6.0, 6.0))
        assert (found.precision, found.training) == (LAST, LAST)
        assert [(t.precision, t.seconds, t.training) for t in found.trials] == [
            (PLAIN, 100.0, 0.0),
            (LAST, 50.0, 300.0),
            (HALF, 155.0, 0.0),  # of the part, which took more than three times as long; neither whole nor trained
        ]

    def test_what_every_call_costs_makes_nothing_hopeless(self):
        passes = [2.0 + each * images for images in (3, 20, 20) for each in (0.2, 0.1, 0.02)]  # a part, and all, of 20
        found = choice(clock(*passes, *[1.0] * 6))
        assert found.precision == HALF
        assert found.trials[-1].seconds == pytest.approx(1000 * 2.4 / 20)

    def test_what_is_slow_but_not_hopeless_is_tried_in_training(self):
        found = choice(timed(4.0, 1.0, 2.9, 6.0, 3.0))
        assert (found.precision, found.training) == (LAST, HALF)

    def test_what_decides_otherwise_is_not_chosen_to_measure(self):
        class Close(nn.Module):
            """Classes a hair apart, which bfloat16 can't tell from each other."""

            def __init__(self) -> None:
                super().__init__()
                self.last = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0001])[:, None].repeat(1, 64))

            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.linear(x.flatten(1).abs() + 1, self.last)

        found = choice(timed(9.0, 9.0, 1.0, 9.0, 1.0), Close())
        assert found.precision.dtype == "float32"
        assert found.trials[-1].differs == 1.0
        assert found.training.dtype == "float32"  # of the layout that measures fastest, where bfloat16 was not tried

    def test_a_network_that_bfloat16_breaks(self):
        class Strict(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if x.dtype != torch.float32:
                    raise RuntimeError("expected scalar type Float")
                return x

        found = choice(clock(*[PART * 4.0] * 2, *[4.0] * 4, *[1.0] * 3), convolutional(Strict()))
        assert (found.precision, found.training) == (PLAIN, PLAIN)
        assert found.trials[-1].failure == "fails: expected scalar type Float"
        assert "bfloat16 channels-last fails: expected scalar type Float" in str(found)

    def test_a_network_that_does_not_run_at_all_says_so(self):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            choice(clock(), seeded(lambda: nn.Linear(3, 3)))

    def test_what_is_not_finite_while_training_is_not_trained_in(self):
        class Overflows(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * (torch.inf if x.dtype == torch.bfloat16 and self.training else 1.0)

        found = choice(timed(4.0, 4.0, 1.0, 9.0, 1.0), convolutional(Overflows()))
        assert (found.precision, found.training) == (HALF, LAST)

    def test_a_network_that_can_t_be_trained_on_so_few_is_measured_all_the_same(self):
        class Two(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return (x, x) if self.training else x

        model = nn.Sequential(convolutional(), Two())
        found = choice(timed(4.0, 2.0, 1.0, 6.0, 3.0), model)
        assert (found.precision, found.training) == (HALF, LAST)

    def test_any_error_in_another_format_rules_it_out(self):
        class Asserting(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                assert x.dtype == torch.float32
                return x

        assert (
            choice(clock(*[PART * 4.0] * 2, *[4.0] * 4, *[1.0] * 3), convolutional(Asserting())).trials[-1].failure
            is not None
        )

    @pytest.mark.parametrize(
        ("metric", "differs"),
        [
            (lambda outputs, targets: outputs.argmax(1) == targets, 0.0),
            (lambda outputs, targets: torch.full((len(targets),), torch.nan), 0.0),
            (lambda outputs, targets: outputs.mean(1).round(decimals=3), 0.0),
            (lambda outputs, targets: (outputs.mean(1) * 1e4) % 1, 0.9),
        ],
        ids=["yes or no", "not a number", "continuous", "chaotic"],
    )
    def test_scores_of_other_kinds(self, metric: Callable[[Tensor, Tensor], Tensor], differs: float):
        times = timed(4.0, 2.0, 1.0, 6.0, 3.0)
        found = choose(convolutional(), IMAGES, CLASSES, metric, cross_entropy, clock=times)
        assert found.trials[-1].differs == pytest.approx(differs, abs=0.1)
        assert found.precision == (LAST if differs else HALF)

    def test_inputs_that_are_no_images_have_one_layout(self):
        model, inputs = seeded(lambda: nn.Linear(6, 4)), torch.ones(9, 6)
        found = choose(model, inputs, torch.zeros(9).long(), top1, cross_entropy, clock=clock(*[1.0] * 12))
        assert [trial.precision for trial in found.trials] == [PLAIN, Precision("bfloat16", False)]

    def test_written_and_read(self):
        found = choice(timed(4.0, 2.0, 1.0, 6.0, 3.0))
        assert Choice.of(found.to_dict()) == found
        untimed = Choice(LAST, LAST, untimed="small: not timed")
        assert Choice.of(untimed.to_dict()) == untimed

    def test_in_words(self):
        trials = (Trial(LAST, 1.0, 0.0, 3.0), Trial(HALF, 0.5, 0.002, 4.0))
        assert str(Choice(HALF, LAST, trials)) == (
            "measured in bfloat16 channels-last, trained in float32 channels-last (a thousand samples: float32 "
            "channels-last 1.00 s, training 3.00 s; bfloat16 channels-last 0.50 s, training 4.00 s, 0.2% differ)"
        )


class TestChosen:
    def test_small_networks_are_not_timed(self, task: Task, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(precision, "choose", None)
        found = chosen(task, task.model, cost(10_000))
        assert (found.precision, found.training, found.trials) == (LAST, LAST, ())
        assert str(found) == "measured in float32 channels-last (small: not timed)"

    def test_nor_with_hardly_any_samples_or_room(self, task: Task, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(precision, "choose", None)
        why = "too few samples or too large activations: not timed"
        assert chosen(task, task.model, cost(10**9, activations=1 << 28)) == Choice(LAST, LAST, untimed=why)
        few = Task(task.model, train=(IMAGES[:10], CLASSES[:10]), val=(IMAGES[10:], CLASSES[10:]))
        assert chosen(few, few.model, cost(10**9)) == Choice(LAST, LAST, untimed=why)

    def test_batches_are_put_together(self, task: Task, monkeypatch: pytest.MonkeyPatch):
        seen = []
        monkeypatch.setattr(precision, "choose", lambda model, inputs, targets, *_, **__: seen.append(len(targets)))
        monkeypatch.setattr(task, "val_batches", lambda size: ((IMAGES[:1], CLASSES[:1]) for _ in range(200)))
        chosen(task, task.model, cost(10**9))
        assert seen == [64]

    def test_by_name(self, task: Task):
        assert chosen(task, task.model, cost(10**9), "bfloat16") == Choice(HALF, HALF)
        assert chosen(task, task.model, cost(10**9), "float32") == Choice(LAST, LAST)

    def test_large_networks_are_timed_on_validation_samples(self, task: Task):
        task.model.zero_grad()
        before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
        found = chosen(task, task.model, cost(10**9))
        assert [trial.precision for trial in found.trials] == [PLAIN, LAST, HALF]
        assert all(trial.seconds > 0 for trial in found.trials)
        assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
        assert all(parameter.grad is None for parameter in task.model.parameters())


class TestRunning:
    def test_outputs_reach_the_metric_in_float32(self, task: Task):
        seen = []

        def metric(outputs: Tensor, targets: Tensor) -> Tensor:
            seen.append(outputs.dtype)
            return top1(outputs, targets)

        rounded = measure(task.model, task.val_batches(50), metric, cross_entropy, HALF)
        exact = measure(task.model, task.val_batches(50), metric, cross_entropy)
        assert set(seen) == {torch.float32}
        assert 0 < float((rounded.losses - exact.losses).abs().max()) < 0.1

    def test_weights_are_trained_in_float32(self, task: Task, make_evaluator: Callable[..., Evaluator]):
        evaluator = make_evaluator(task, Recovery(200, 3, Recipe(lr=0.05)))
        exact, _ = evaluator.pipeline.recovered(Policy({}))
        evaluator.bench.choice = Choice(LAST, HALF)
        rounded, _ = evaluator.pipeline.recovered(Policy({}))
        pairs = list(zip(exact.parameters(), rounded.parameters(), strict=True))
        assert all(b.dtype == torch.float32 for _, b in pairs)
        assert any(not torch.equal(a, b) for a, b in pairs)
        assert all(torch.allclose(a, b, atol=0.02) for a, b in pairs)

    def test_the_numbers_of_the_picked_network_are_float32(self, task: Task, make_evaluator: Callable[..., Evaluator]):
        plain = make_evaluator(task).bench
        bench = Workbench(task, plain.structure, plain.orders, 200, 0, precision="bfloat16")
        evaluator = Evaluator(Pipeline(bench, Recovery(200, 0), 0), make_evaluator(task).costs, Ledger())
        policy = plain.structure.policy({group.name: group.size // 2 for group in plain.structure})
        candidate = evaluator.evaluate(policy, arm="search", agent="tpe")
        picked = rebuild(evaluator, candidate, "the only one")
        exact = measure(picked.model, bench.placed(task.val_batches()), top1, cross_entropy).summary("reconstructed")
        assert picked.measured == exact
        assert candidate.measurements[0].loss != exact.loss

    def test_rounding_does_not_make_the_picked_network_another(
        self, task: Task, make_evaluator: Callable[..., Evaluator]
    ):
        made = make_evaluator(task)
        bench = Workbench(task, made.bench.structure, made.bench.orders, 200, 0, precision="bfloat16")
        evaluator = Evaluator(Pipeline(bench, Recovery(200, 0), 0), made.costs, made.ledger)
        policy = bench.structure.policy({group.name: group.size // 2 for group in bench.structure})
        candidate = evaluator.evaluate(policy, arm="search", agent="tpe")

        def measured(shift: float, error: float) -> Candidate:
            (one,) = candidate.measurements
            found = replace(one, accuracy=one.accuracy - shift, accuracy_se=error)
            return replace(candidate, measurements=(found,))

        for error in (0.0, math.nan):
            assert rebuild(evaluator, measured(0.01, error), "").accuracy > 0
            with pytest.raises(RunError, match="its network, rebuilt from its seed"):
                rebuild(evaluator, measured(0.1, error), "")


def test_batches_are_placed_in_the_layout() -> None:
    batches = [(torch.zeros(2, 3, 4, 5), torch.zeros(2)), (torch.zeros(2, 3), torch.zeros(2))]
    placed = list(HALF.placed(batches, torch.device("cpu")))
    assert placed[0][0].is_contiguous(memory_format=torch.channels_last)
    assert [inputs.dtype for inputs, _ in placed] == [torch.float32] * 2
    assert list(itertools.chain(*(inputs.shape for inputs, _ in placed))) == [2, 3, 4, 5, 2, 3]
