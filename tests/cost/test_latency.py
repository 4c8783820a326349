import pytest
import torch
from torch import nn

from autoprune.cost.latency import Latency, compare, measure_latency
from autoprune.errors import ConfigError


class Watch:
    """A clock that only moves when a network says that it worked."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        self.log.append(name)
        self.now += seconds


class Working(nn.Module):
    """Takes the next of its seconds with every call."""

    def __init__(self, watch, name, seconds):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
        self.watch, self.name, self.seconds = watch, name, list(seconds)

    def forward(self, x, scale=1.0):
        self.watch.work(self.name, self.seconds.pop(0))
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.inner(x * scale)


X = torch.ones(4, 3)


class TestCompare:
    def test_networks_take_turns(self):
        watch = Watch()
        models = {name: Working(watch, name, [1.0] * 5) for name in ("a", "b")}
        compare(models, X, warmup=2, repeats=3, clock=watch)
        assert watch.log == ["a", "b"] * 5

    def test_median_and_spread_are_of_what_is_not_warm_up(self):
        watch = Watch()
        models = {
            "a": Working(watch, "a", [90.0, 50.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
            "b": Working(watch, "b", [90.0, 50.0, 7.0, 7.0, 7.0, 7.0, 9.0]),
        }
        found = compare(models, X, warmup=2, repeats=5, clock=watch)
        assert {name: (latency.median_ms, latency.spread_ms) for name, latency in found.items()} == {
            "a": (pytest.approx(3000), pytest.approx(2000)),
            "b": (pytest.approx(7000), pytest.approx(0)),
        }

    def test_modes_are_restored_each_on_its_own(self):
        watch = Watch()
        model = Working(watch, "a", [1.0] * 2).train()
        model.inner[1].eval()
        compare({"a": model}, X, warmup=1, repeats=1, clock=watch)
        assert [module.training for module in model.modules()] == [True, True, True, False]

    def test_modes_are_restored_when_it_fails(self):
        model = nn.Linear(3, 2).train()
        with pytest.raises(RuntimeError):
            compare({"a": model}, torch.ones(1, 4))
        assert model.training

    @pytest.mark.parametrize("numbers", [{"warmup": 0}, {"repeats": 0}, {"warmup": -1}])
    def test_numbers_below_one(self, numbers):
        with pytest.raises(ConfigError, match="warm-up and repeats must be at least 1, but got warmup="):
            compare({"a": nn.Identity()}, X, **numbers)


class TestMeasureLatency:
    @pytest.mark.parametrize("inputs", [X, (X, 2.0), {"x": X, "scale": 2.0}], ids=["tensor", "tuple", "mapping"])
    def test_what_a_network_is_called_with(self, inputs):
        watch = Watch()
        latency = measure_latency(Working(watch, "a", [1.0] * 3), inputs, warmup=1, repeats=2, clock=watch)
        assert (latency.median_ms, latency.batch, latency.repeats) == (1000.0, 4, 2)

    def test_it_says_what_it_was_measured_on(self):
        latency = measure_latency(nn.Linear(3, 2), X, warmup=1, repeats=2)
        assert latency.device.startswith("cpu: ")
        assert len(latency.device) > len("cpu: ")
        assert (latency.threads, latency.form) == (torch.get_num_threads(), "eager")

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_on_the_real_clock(self):
        with torch.random.fork_rng():
            net = nn.Linear(3, 2)
        latency = measure_latency(net, X)
        assert latency.median_ms > 0
        assert latency.spread_ms >= 0
        assert all(parameter.requires_grad for parameter in net.parameters())

    def test_its_text(self):
        assert str(Latency(12.3456, 0.5, 9, "cpu: any", 1, "eager", 1)) == "12.3 ms ± 0.25"

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_an_accelerator_is_waited_for(self):
        net, x = nn.Linear(4096, 4096, device="cuda"), torch.ones(4096, 4096, device="cuda")
        latency = measure_latency(net, x)
        assert latency.device.startswith("cuda: ")
        assert latency.median_ms > 0.1  # over 137 GFLOP; no device that is not waited for returns as late


class TestCompiled:
    @pytest.fixture
    def compiled(self, monkeypatch):
        """Stand in for the compiler, which takes many seconds."""
        seen = []

        def stand_in(model, **options):
            seen.append(options)
            return lambda *args, **kwargs: model(*args, **kwargs)

        monkeypatch.setattr(torch, "compile", stand_in)
        return seen

    def test_what_the_compiler_makes_is_measured(self, compiled):
        watch = Watch()
        models = {name: Working(watch, name, [30.0, 5.0, 1.0, 1.0]) for name in ("a", "b")}
        found = compare(models, X, warmup=1, repeats=2, compiled=True, clock=watch)
        assert {(latency.form, latency.median_ms) for latency in found.values()} == {("compiled", 1000.0)}
        assert watch.log == ["a", "b"] + ["a", "b"] * 3  # compiling is a call of its own

    def test_each_network_is_compiled_for_its_own_sizes(self, compiled):
        compare({"a": nn.Identity(), "b": nn.Identity()}, X, compiled=True)
        assert compiled == [{"dynamic": False, "isolate_recompiles": True}] * 2

    def test_a_network_that_does_not_compile(self, monkeypatch):
        def broken(model, **options):
            def fast(*args):
                raise RuntimeError("no such operator\nand a long trace")

            return fast

        monkeypatch.setattr(torch, "compile", broken)
        with pytest.raises(
            ConfigError, match=r"torch.compile fails on Linear \(RuntimeError: no such operator\); measur"
        ):
            measure_latency(nn.Linear(3, 2), X, compiled=True)
