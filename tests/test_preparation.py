from pathlib import Path

import pytest
import torch

from autoprune.errors import RunError, UnknownNameError
from autoprune.evaluation import Precision
from autoprune.moments import Moments
from autoprune.preparation import prepare
from autoprune.run import RunFolder
from autoprune.settings import SearchSettings
from autoprune.task import Task
from autoprune.testing import TinyNet


def make_task() -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = TinyNet().eval()
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(80, 1, 8, 8, generator=generator), torch.arange(80) % 4
    return Task(model, train=(inputs[:50], targets[:50]), val=(inputs[50:], targets[50:]))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


class TestPrecision:
    def test_it_is_chosen_once(self, folder: RunFolder) -> None:
        prepared = prepare(make_task(), SearchSettings(precision="bfloat16"), folder)
        assert prepared.bench.precision == Precision("bfloat16", True)
        again = prepare(make_task(), SearchSettings(precision="auto"), folder)  # what is written down counts
        assert again.bench.choice == prepared.bench.choice

    def test_without_a_folder(self) -> None:
        bench = prepare(make_task(), SearchSettings()).bench
        assert (bench.precision, bench.choice.trials) == (Precision("float32", True), ())

    def test_one_that_does_not_exist(self) -> None:
        with pytest.raises(UnknownNameError, match="int8"):
            SearchSettings(precision="int8")


class TestMoments:
    def test_they_are_collected_when_somebody_asks(self, folder: RunFolder) -> None:
        prepared = prepare(make_task(), SearchSettings(), folder)
        assert not folder.moments.exists()
        assert prepared.analytic().missing == ()
        assert folder.moments.exists()

    def test_they_are_collected_once(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        first = prepare(make_task(), SearchSettings(), folder).analytic()
        monkeypatch.setattr(Moments, "collect", None)
        again = prepare(make_task(), SearchSettings(), folder).analytic()
        for name in first.losses:
            assert again.losses[name].tolist() == first.losses[name].tolist()

    def test_those_of_another_seed_are_refused(self, folder: RunFolder) -> None:
        prepare(make_task(), SearchSettings(), folder).analytic()
        with pytest.raises(RunError, match="moments of another network or other data"):
            prepare(make_task(), SearchSettings(seed=1), folder).analytic()

    def test_the_criterion_and_the_prediction_share_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        collect = Moments.collect.__func__

        def counted(cls: type[Moments], *args: object, **named: object) -> Moments:
            calls.append(named)
            return collect(cls, *args, **named)

        monkeypatch.setattr(Moments, "collect", classmethod(counted))
        prepare(make_task(), SearchSettings(criterion="obs", moments_memory=0.5), None).analytic()
        assert [named["memory"] for named in calls] == [500_000_000]
