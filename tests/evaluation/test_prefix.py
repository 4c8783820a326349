"""What probes share with the dense network: cut points of many shapes of code, and that nothing else is measured."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.evaluation import Evaluator, Workbench
from autoprune.evaluation.prefix import Prefix
from autoprune.scoring import Evidence, removal_orders
from autoprune.scoring.l1 import L1
from autoprune.structure import Structure, analyse, cut, plan
from autoprune.task import Task
from autoprune.testing import TinyResNet

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

CONV = {"kernel_size": 3, "padding": 1}


class Staged(nn.Module):
    """A stem, two residual blocks and a head: `(n, 1, 8, 8)` to `(n, 4)`."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Conv2d(6, 8, **CONV), nn.BatchNorm2d(8), nn.Conv2d(8, 6, **CONV)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.relu(self.norm(self.up(x))))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(1, 6, **CONV), self.Block(), self.Block()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(F.relu(self.stem(x)))).mean((2, 3)))


class Skipping(Staged):
    """The second block also reads what came before the first."""

    def forward(self, x: Tensor) -> Tensor:
        early = F.relu(self.stem(x))
        return self.fc((self.second(self.first(early)) + early).mean((2, 3)))


class InPlace(nn.Module):
    """Activations that overwrite what they read, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 6, **CONV), nn.Conv2d(6, 6, **CONV), nn.Conv2d(6, 6, **CONV)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.b(self.relu(self.a(x))))
        return self.fc(self.c(x).mean((2, 3)))


class Functional(nn.Module):
    """The last convolution's weights are read without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 6, **CONV), nn.Conv2d(6, 6, **CONV), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.fc(F.relu(F.conv2d(x, self.b.weight, self.b.bias, padding=1)).mean((2, 3)))


class Attending(nn.Module):
    """Patches, an attention block, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention = nn.Linear(16, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.fc = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x.reshape(-1, 4, 16))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(F.relu(self.up(x)))
        return self.fc(x.mean(1))


class Remembering(Staged):
    """The first block keeps a number of its own, which the head divides by."""

    class Keeping(Staged.Block):
        def forward(self, x: Tensor) -> Tensor:
            self.power = float(x.square().mean())
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.first = self.Keeping()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.first.power


class Listing(Staged):
    """What came before the first block is kept in a list, for the end."""

    class Keeping(Staged.Block):
        def forward(self, x: Tensor) -> Tensor:
            self.skips = [x]
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.first = self.Keeping()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(F.relu(self.stem(x)))) + self.first.skips[0]
        return self.fc(x.mean((2, 3)))


class Masking(nn.Module):
    """Where an embedding is zero is looked up between modules: `(n, 8)` tokens, of which 0 is none."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 6)
        self.up, self.down, self.fc = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        empty = (x == 0).all(-1, keepdim=True)
        x = self.mix(x)
        x = x + self.down(F.relu(self.up(x)))
        return self.fc(x.masked_fill(empty, 0.0).mean(1))


class NormTwice(nn.Module):
    """A batch-norm that runs twice before what is cut, once by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(1, 6, **CONV), nn.BatchNorm2d(6), nn.Conv2d(6, 6, **CONV)
        self.up, self.down, self.fc = nn.Conv2d(6, 8, **CONV), nn.Conv2d(8, 6, **CONV), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(F.relu(self.norm(input=self.stem(x)))))
        return self.fc(self.down(F.relu(self.up(x))).mean((2, 3)))


class Widening(nn.Module):
    """Narrow, then wide, then what is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(1, 2, **CONV), nn.Conv2d(2, 12, **CONV)
        self.up, self.down, self.fc = nn.Conv2d(12, 8, **CONV), nn.Conv2d(8, 6, **CONV), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.down(F.relu(self.up(self.wide(F.relu(self.narrow(x)))))).mean((2, 3)))


def task_of(make: Callable[[], nn.Module]) -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make()
    generator = torch.Generator().manual_seed(1)
    images, targets = torch.randn(130, 1, 8, 8, generator=generator), torch.arange(130) % 4
    if make is Masking:
        images = torch.randint(0, 9, (130, 8), generator=generator)
        images[:80].clamp_(min=1)  # no gaps in what layers are fitted on
    return Task(model, train=(images[:80], targets[:80]), val=(images[80:], targets[80:]))


def bench_of(make: Callable[[], nn.Module], **options: Any) -> Workbench:
    task = task_of(make)
    structure = analyse(task.model, task.example_input)
    orders = removal_orders(L1().score(task.model, structure, Evidence([], task.loss, 0)))
    return Workbench(task, structure, orders, 80, 0, **options)


ALL = [
    *(Staged, Skipping, InPlace, Functional, Attending, TinyResNet),
    *(Remembering, Listing, Masking, NormTwice),
]


class TestProbe:
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("make", ALL)
    def test_it_is_what_the_whole_network_measures(self, make: Callable[[], nn.Module], precision: str) -> None:
        bench = bench_of(make, precision=precision)
        for order in (list(bench.structure), list(bench.structure)[::-1]):
            for group in order:
                removed = {group.name: group.size // 2}
                whole, probed = bench.measure(bench.recovered(removed)), bench.probe(removed)
                torch.testing.assert_close(probed.losses, whole.losses, rtol=0, atol=1e-6)
                assert torch.equal(probed.scores, whole.scores)

    def test_what_runs_before_is_not_run_again(self) -> None:
        bench = bench_of(Staged)
        macs = {"stem": 1 * 9 * 6, "block": 2 * 6 * 8 * 9}  # of one position
        whole = 64 * (macs["stem"] + 2 * macs["block"]) + 6 * 4
        for name in ("stem", "first.up", "first.up", "second.up", "second.up", "first.up"):
            bench.probe({name: 3})
        after_stem, after_block = (1 - 64 * before / whole for before in (macs["stem"], macs["stem"] + macs["block"]))
        # what makes a cut point's outputs is counted too: from the start, from the one before, and anew on the way back
        assert bench.executed == pytest.approx([1, 1, after_stem, after_stem, after_block, 1])

    def test_the_modules_before_do_not_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = bench_of(Staged)
        bench.probe({"second.up": 2})
        ran: list[str] = []
        real = nn.Conv2d.forward

        def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
            ran.append("stem" if self.in_channels == 1 else "block")
            return real(self, x)

        monkeypatch.setattr(nn.Conv2d, "forward", forward)
        bench.probe({"second.up": 2})
        assert ran == ["block", "block"] * 2  # one pass to fit, one batch to measure

    def test_a_network_that_reaches_around_a_block_begins_before_it(self) -> None:
        bench = bench_of(Skipping)
        for removed in (2, 1):
            bench.probe({"second.up": removed})
        stem, block = 1 * 9 * 6, 2 * 6 * 8 * 9  # multiply-adds of one position
        assert bench.executed == [1.0, pytest.approx(1 - 64 * stem / (64 * (stem + 2 * block) + 6 * 4))]

    @pytest.mark.parametrize(
        ("precision", "room", "begins_after"),
        [
            ("float32", 130 * 3072, "wide"),
            ("float32", 130 * 3072 - 1, "narrow"),
            ("bfloat16", 80 * 3072 + 50 * 1536, "wide"),
            ("bfloat16", 80 * 3072 + 50 * 1536 - 1, "narrow"),
            ("float32", 130 * 512, "narrow"),
            ("float32", 130 * 512 - 1, None),
        ],
    )
    def test_it_begins_as_late_as_there_is_room_for(self, precision: str, room: int, begins_after: str | None) -> None:
        """80 images are fitted on, in float32, and 50 measured; 2 and 12 channels of 64 numbers are kept of each."""
        bench = bench_of(Widening, precision=precision, activations_memory=room)
        bench.probe({"up": 2})
        probed = bench.probe({"up": 3})
        assert (None if bench._kept is None else bench._kept[0].name) == begins_after
        assert (bench.executed[1] < 1) == (begins_after is not None)
        whole = bench.measure(bench.recovered({"up": 3}))
        torch.testing.assert_close(probed.losses, whole.losses, rtol=0, atol=1e-6)

    def test_what_is_kept_makes_room_as_the_next_is_computed(self) -> None:
        bench = bench_of(Staged)
        bench.probe({"first.up": 2})
        before = bench._kept
        assert before is not None
        sizes = [sum(outputs.nbytes for outputs in kept) for kept in before[1:]]
        assert sizes == [80 * 6 * 64 * 4, 50 * 6 * 64 * 4]
        bench.probe({"second.up": 2})
        assert before[1:] == ([], [])
        assert bench._kept is not None
        assert [len(kept) for kept in bench._kept[1:]] == [1, 1]

    @pytest.mark.parametrize(
        "options", [{"activations_memory": 1000}, {"rung": "recalibrated"}], ids=["memory", "recalibrated"]
    )
    def test_without_room_or_where_all_changes_it_runs_as_a_whole(self, options: dict[str, Any]) -> None:
        bench = bench_of(Staged, **options)
        probed = bench.probe({"second.up": 2})
        assert bench.executed == [1.0]
        assert torch.equal(probed.losses, bench.measure(bench.recovered({"second.up": 2})).losses)

    def test_a_forward_of_an_instance_is_put_back(self) -> None:
        bench = bench_of(Staged)
        own = MethodType(lambda self, x: nn.Conv2d.forward(self, x) * 2, bench.model.stem)
        bench.model.stem.forward = own
        bench.probe({"second.up": 2})
        assert vars(bench.model.stem)["forward"] is own

    def test_what_is_kept_can_be_forgotten(self) -> None:
        bench = bench_of(Staged)
        bench.probe({"second.up": 2})
        assert bench._kept is not None
        bench.forget()
        assert bench._kept is None

    def test_the_network_is_as_before(self) -> None:
        bench = bench_of(Staged)
        before = {name: value.clone() for name, value in bench.model.state_dict().items()}
        modes = [module.training for module in bench.model.modules()]
        bench.probe({"second.up": 2})
        bench.probe({"first.up": 2})
        assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())
        assert [module.training for module in bench.model.modules()] == modes
        assert not any("forward" in vars(module) or module._forward_hooks for module in bench.model.modules())


class TestPoints:
    def points(self, make: Callable[[], nn.Module]) -> dict[str, str | None]:
        model = task_of(make).model.eval()
        structure: Structure = analyse(model, torch.zeros(1, 1, 8, 8))
        prefix = Prefix(model, torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)))
        found = {}
        for group in structure:
            point = prefix.point(plan(model, structure, {group.name: [0]}))
            found[group.name] = None if point is None else point.name
        return found

    def test_the_last_module_before_what_is_cut(self) -> None:
        assert self.points(Staged) == {"stem": None, "first.up": "stem", "second.up": "first"}

    def test_weights_that_are_read_without_a_call_count_from_the_start(self) -> None:
        assert self.points(Functional) == {"a": None, "b": None}

    def test_a_module_is_verified_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tried: list[str] = []
        real = Prefix._stands

        def stands(self: Prefix, call: Any) -> Any:
            tried.append(call.name)
            return real(self, call)

        monkeypatch.setattr(Prefix, "_stands", stands)
        points = self.points(Remembering)
        assert points["second.up"] is not None
        assert len(tried) == len(set(tried)) > 2

    def test_a_block_that_goes(self) -> None:
        model = task_of(Staged).model.eval()
        structure = analyse(model, torch.zeros(1, 1, 8, 8), kinds=("blocks",))
        prefix = Prefix(model, torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)))
        change = plan(model, structure, {"second": [0]})
        point = prefix.point(change)
        assert point is not None
        assert point.name == "first"
        inputs = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        smaller = cut(model, change)
        with prefix.skipped(smaller, point) as handed:
            handed.give(model.first(F.relu(model.stem(inputs))), 2)
            assert torch.equal(smaller(torch.full_like(inputs, torch.nan)), cut(model, change)(inputs))

    def test_shared_modules_count_from_their_first_call(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 4)
                self.alias = self.b

            def forward(self, x: Tensor) -> Tensor:
                return self.c(F.relu(self.alias(F.relu(self.b(F.relu(self.a(x.flatten(1))))))))

        assert set(self.points(Twice).values()) <= {None, "a"}


def test_evaluator_s_candidates_are_not_probes(task: Task, make_evaluator: Callable[..., Evaluator]) -> None:
    made = make_evaluator(task)
    made.evaluate(made.bench.structure.policy({"conv1": 2}), arm="search", agent="tpe")
    assert made.bench.executed == []
