import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from autoprune import preparation
from autoprune.errors import RunError, UnknownNameError
from autoprune.evaluation import Precision
from autoprune.finetuning import Recipe, recalibrate, train_shared
from autoprune.models import build
from autoprune.moments import Moments, readers_of
from autoprune.preparation import prepare
from autoprune.progress import Silent
from autoprune.run import RunFolder
from autoprune.seeds import derive
from autoprune.settings import SearchSettings
from autoprune.structure import cut, plan
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


SHARED: dict[str, Any] = {"shared_steps": 3, "budget": "macs<=50%", "calibration_images": 40}


class Watcher(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.said.append(text)

    def begin(self, stage: str, total: int) -> None:
        self.said.append(f"{stage}: {total}")

    def step(self, done: int, text: str) -> None:
        self.said.append(f"{done} {text.split()[0]}")


class TestSharedWeights:
    def test_without_them_all_is_the_users_own_network(self, folder: RunFolder) -> None:
        bench = prepare(make_task(), SearchSettings(), folder).bench
        assert bench.weights is None
        assert bench.model is bench.original
        assert bench.whole is bench.dense
        assert not folder.shared.exists()

    def test_candidates_are_cut_from_them_and_compared_with_the_users_own(self, folder: RunFolder) -> None:
        task = make_task()
        plain = prepare(task, SearchSettings(budget="macs<=50%", calibration_images=40))
        prepared = prepare(task, SearchSettings(**SHARED), folder)
        bench = prepared.bench
        for name, value in task.model.state_dict().items():
            assert torch.equal(bench.original.state_dict()[name], value)
        assert not torch.equal(bench.model.get_parameter("conv1.weight"), task.model.get_parameter("conv1.weight"))
        assert bench.dense.summary("dense") == plain.bench.dense.summary("dense")
        assert (
            bench.whole.summary("dense") == bench.measure(bench.model).summary("dense") != bench.dense.summary("dense")
        )
        assert [m.loss for m in bench.recalibrating()] == [m.loss for m in plain.bench.recalibrating()]
        assert bench.orders == plain.bench.orders  # of the original weights
        removed = {"conv1": 3, "conv2": 0}
        sliced = cut(bench.model, bench.change(removed)).get_parameter("conv1.weight")
        kept = sorted(bench.orders["conv1"][3:])
        assert torch.equal(sliced, bench.model.get_parameter("conv1.weight")[kept])
        whole = bench.recovered({})
        torch.testing.assert_close(whole.get_parameter("fc.weight"), bench.model.get_parameter("fc.weight"))

    def test_they_are_what_training_by_hand_gives(self) -> None:
        settings = SearchSettings(**SHARED, lr=0.05, seed=4, recover="recalibrated")
        prepared = prepare(make_task(), settings)
        task, structure, orders = make_task(), prepared.structure, prepared.bench.orders
        model = task.fresh_model().to(memory_format=torch.channels_last)
        changes = (
            [plan(model, structure, {name: orders[name][:n] for name, n in removed.items()}) for removed in policies]
            for policies in preparation._drawn(prepared.feasible, settings)
        )
        seed = derive(4, "shared")
        stream = task.train_batches(128, seed)
        train_shared(model, stream, changes, 3, recipe=Recipe(lr=0.05), loss=task.loss, seed=seed)
        recalibrate(model, task.calibration_batches(40, 250, derive(4, "calibration")))
        for name, value in model.state_dict().items():
            torch.testing.assert_close(prepared.bench.model.state_dict()[name], value, msg=name)

    def test_they_are_trained_once_and_read_again(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        watcher = Watcher()
        first = prepare(make_task(), SearchSettings(**SHARED), folder, watcher).bench
        assert watcher.said[:-1] == ["training shared weights: 3", "1 loss", "2 loss", "3 loss"]
        assert re.fullmatch(r"trained one set of weights for all candidates for 3 steps in \d+\.\d s", watcher.said[-1])
        monkeypatch.setattr(preparation, "train_shared", None)
        watcher = Watcher()
        again = prepare(make_task(), SearchSettings(**SHARED), folder, watcher).bench
        assert watcher.said == []
        assert first.weights is not None
        assert again.weights is not None
        assert again.weights.digest == first.weights.digest
        assert again.whole.summary("") == first.whole.summary("")

    @pytest.mark.parametrize(
        ("changed", "name"),
        [
            ({"lr": 0.02}, "lr"),
            ({"shared_steps": 4}, "shared_steps"),
            ({"seed": 1}, "seed"),
            ({"space": "stage"}, "space"),
        ],
    )
    def test_those_of_other_settings_are_refused(self, changed: dict[str, Any], name: str, folder: RunFolder) -> None:
        prepare(make_task(), SearchSettings(**SHARED), folder)
        with pytest.raises(RunError, match=f"trained with another {name} "):
            prepare(make_task(), SearchSettings(**SHARED | changed), folder)

    def test_they_are_trained_in_the_precision_that_candidates_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        formats = []

        def noting(*args: Any, **named: Any) -> None:
            with named["running"]():
                formats.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)

        monkeypatch.setattr(preparation, "train_shared", noting)
        for precision in ("float32", "bfloat16"):
            prepare(make_task(), SearchSettings(**SHARED, precision=precision))
        assert formats == [torch.float32, torch.bfloat16]

    def test_predictions_see_them_and_criteria_do_not(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = SearchSettings(**SHARED, criterion="obs")
        plain = prepare(make_task(), dataclasses.replace(settings, shared_steps=0))
        prepared = prepare(make_task(), settings, folder)
        assert prepared.bench.orders == plain.bench.orders
        predicted = prepared.analytic()
        assert (folder.moments.exists(), folder.shared_moments.exists()) == (True, True)
        wanted = prepared.bench.model
        own = Moments.collect(
            wanted, prepared.evidence.batches, readers_of(prepared.structure), seed=derive(0, "moments")
        )
        torch.testing.assert_close(
            prepared.evidence.moments(wanted, prepared.structure)["fc.weight"].mean, own["fc.weight"].mean
        )
        assert predicted.losses["conv1"].tolist() != plain.analytic().losses["conv1"].tolist()
        monkeypatch.setattr(Moments, "collect", None)
        again = prepare(make_task(), settings, folder).analytic()
        assert again.losses["conv1"].tolist() == predicted.losses["conv1"].tolist()

    @pytest.mark.parametrize(
        ("settings", "least"),
        [({"budget": "macs<=50%"}, 0.5), ({"budget": "macs<=60%", "max_drop": 0.1}, 0.15), ({"max_drop": 0.1}, 0.25)],
    )
    def test_policies_cost_what_candidates_do(self, settings: dict[str, Any], least: float) -> None:
        """All of the budget, or where accuracy is traded for cost, between about a quarter of it and the whole."""
        task = Task(
            build("resnet8", input_size=8),
            train=(torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10),
            val=(torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 10),
        )
        options = SearchSettings(**settings, shared_steps=1, calibration_images=20)
        prepared = prepare(task, dataclasses.replace(options, shared_steps=0))
        feasible = prepared.feasible
        drawn = list(itertools.islice(preparation._drawn(feasible, options), 10))
        whole = feasible.costs.dense.macs
        reached = feasible.utilisation(feasible.upper)
        uniform = feasible.uniform(1.0 if "max_drop" not in settings else 0.75 * reached + 0.25).tolist()
        assert feasible.upper.tolist() != uniform
        limit = feasible.budget.limits[0].absolute(feasible.costs.dense) / whole if feasible.budget.limits else 1.0
        for smallest, *random in drawn:
            assert list(smallest.values()) == uniform
            shares = [feasible.costs.cost(removed).macs / whole for removed in random]
            assert len(shares) == 2
            assert all(least - 0.06 < share <= limit for share in shares)
        assert len({tuple(removed.values()) for _, *random in drawn for removed in random}) == 20
        again = list(itertools.islice(preparation._drawn(feasible, options), 10))
        assert again == drawn
        other = dataclasses.replace(options, seed=1)
        assert next(preparation._drawn(feasible, other)) != drawn[0]
