"""Which device is meant, and what holds on CUDA while results are made."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from autoprune.devices import AUTO, exact, nearest, resolve, streamed
from autoprune.errors import ConfigError
from autoprune.seeds import seeded_torch
from autoprune.threads import suited_threads

CPU = torch.device("cpu")


@pytest.fixture
def accelerators(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, int], None]:
    """Return what pretends that there are so many accelerators of a kind, or none."""

    def pretend(kind: str | None, count: int) -> None:
        there = None if kind is None else torch.device(kind)
        monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: there)
        monkeypatch.setattr("torch.accelerator.device_count", lambda: count)
        monkeypatch.setattr("autoprune.devices._fault", lambda device: "no such numbers" if kind == "mps" else None)

    return pretend


class TestResolve:
    def test_the_cpu_is_always_there(self) -> None:
        assert resolve("cpu") == resolve("cpu:0") == CPU

    def test_auto_is_the_accelerator_if_there_is_one(self, accelerators: Callable[[str | None, int], None]) -> None:
        accelerators(None, 0)
        assert resolve(AUTO) == CPU
        accelerators("cuda", 2)
        assert resolve(AUTO) == resolve("cuda") == torch.device("cuda:0")
        assert resolve("cuda:1") == torch.device("cuda:1")

    @pytest.mark.parametrize("name", ["cuda:2", "xpu", "gpu", "meta", ""])
    def test_one_that_is_not_there_is_told_from_those_that_are(
        self, name: str, accelerators: Callable[[str | None, int], None]
    ) -> None:
        accelerators("cuda", 2)
        with pytest.raises(ConfigError, match=f"no device '{name}' here; there are: cpu, cuda:0, cuda:1$"):
            resolve(name)

    def test_one_without_float64_is_passed_over_or_refused(
        self, accelerators: Callable[[str | None, int], None]
    ) -> None:
        accelerators("mps", 1)
        assert resolve(AUTO) == CPU
        with pytest.raises(ConfigError, match=r"mps:0 can't compute in float64, .* \(no such numbers\); take cpu"):
            resolve("mps")

    def test_the_nearest_is_the_same_or_of_its_kind_or_the_cpu(
        self, accelerators: Callable[[str | None, int], None]
    ) -> None:
        accelerators("cuda", 2)
        assert nearest(torch.device("cuda:1")) == torch.device("cuda:1")
        accelerators("cuda", 1)
        assert nearest(torch.device("cuda:1")) == torch.device("cuda:0")
        assert nearest(CPU) == CPU
        accelerators(None, 0)
        assert nearest(torch.device("cuda:1")) == CPU


def flags() -> list[Any]:
    """Return how CUDA would compute; what torch refuses to tell is its refusal."""
    backends = torch.backends
    told: list[Any] = [torch.get_float32_matmul_precision(), backends.cudnn.benchmark, backends.cudnn.deterministic]
    told += [part.fp32_precision for part in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)]
    try:
        return [*told, backends.cudnn.allow_tf32]
    except RuntimeError:
        return [*told, "mixed"]


def _mixed() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def _benchmarking() -> None:
    torch.backends.cudnn.benchmark = True


def _no_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that CUDA was used; what torch is set to is restored."""
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    before = flags()
    yield
    backends = torch.backends
    torch.set_float32_matmul_precision(before[0])
    backends.cudnn.allow_tf32 = before[-1]
    backends.cudnn.conv.fp32_precision, backends.cudnn.rnn.fp32_precision = before[3:5]
    backends.cuda.matmul.fp32_precision = before[5]
    backends.cudnn.benchmark, backends.cudnn.deterministic = before[1:3]
    assert flags() == before


class TestExact:
    def test_it_does_nothing_where_cuda_was_not_used(self) -> None:
        before = flags()
        with exact():
            assert flags() == before

    @pytest.mark.usefixtures("used")
    @pytest.mark.parametrize("set_up", [lambda: None, _benchmarking, _no_tf32, _mixed])
    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_float32_is_float32_and_all_is_restored(self, set_up: Callable[[], None], precision: str) -> None:
        torch.set_float32_matmul_precision(precision)
        set_up()
        before = flags()
        with contextlib.suppress(ZeroDivisionError), exact(), exact():
            assert flags()[1:6] == [False, True, "ieee", "ieee", "ieee"]
            raise ZeroDivisionError
        assert flags() == before

    @pytest.mark.usefixtures("used")
    def test_results_are_made_so_and_times_are_not(self) -> None:
        before = flags()
        with suited_threads(0):
            assert flags() != before
        with suited_threads(0, repeatable=False):
            assert flags() == before


def test_on_the_cpu_batches_come_as_they_are_asked_for() -> None:
    asked = []

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in range(3):
            asked.append(number)
            yield torch.tensor([number]), torch.tensor([number])

    taken = streamed(batches(), lambda inputs: inputs + 1, CPU)
    assert [part.item() for part in next(taken)] == [1, 0]
    assert asked == [0]
    assert [part.item() for part in next(taken)] == [2, 1]


def test_a_seed_touches_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """To seed them all would claim memory on each."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.delattr("torch.cuda.get_rng_state")
    monkeypatch.delattr("torch.cuda.manual_seed_all")
    with seeded_torch(0, CPU):
        torch.rand(1)
