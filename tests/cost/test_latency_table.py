import copy
import dataclasses
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoprune.cost import Budget, CostModel, FeasibleSet
from autoprune.cost.latency_layers import Arguments, Entry, Job, Plan, Site
from autoprune.cost.latency_table import LatencyTable, check
from autoprune.errors import ConfigError
from autoprune.policy import Policy
from autoprune.structure import analyse, remove

OVERHEAD = 5e-4  # seconds that a network takes beside its layers


class Watch:
    """A clock that only moves when a layer says that it worked: in seconds, by numbers and by multiplications."""

    def __init__(self):
        self.now = 0.0
        self.speed = 1.0

    def __call__(self):
        return self.now

    def on(self, net):
        """Make every layer of a network, and whatever is copied from it, take its time."""
        for module in net.modules():
            if module is net:
                module.register_forward_pre_hook(lambda *_: self.work(OVERHEAD))
            elif not list(module.children()):
                module.register_forward_pre_hook(lambda module, args: self.work(seconds(module, args[0])))
        return net

    def work(self, lasting):
        self.now += lasting / self.speed


def seconds(module, x):
    """Return the time of a layer: bilinear in its widths, and proportional to its positions."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() == 1:
        return 1e-7 * x[0].numel()
    inputs = x.shape[-1] if isinstance(module, nn.Linear) else x.shape[1]
    return 1e-6 * weight.shape[0] * weight.shape[1] * (x[0].numel() // inputs)


def true_ms(net, x):
    total = []
    leaves = [module for module in net.modules() if not list(module.children())]
    handles = [m.register_forward_pre_hook(lambda m, args: total.append(seconds(m, args[0]))) for m in leaves]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return 1e3 * (sum(total) + OVERHEAD)


class Net(nn.Module):
    """Convolutions of every sort; the second and third of the last are equal."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.act = nn.ReLU(inplace=True)
        self.wide = nn.Conv2d(16, 24, 1)
        self.up = nn.ConvTranspose2d(24, 8, 2, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 5)

    def forward(self, x):
        x = self.up(self.wide(self.act(self.deep(self.norm(self.stem(x))))))
        x = torch.flatten(self.pool(x), 1)
        return self.last(self.c(self.b(self.a(x))))


def prepared(make, example):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().eval()
    structure = analyse(net, example)
    assert len(structure) > 0
    return net, example, structure, CostModel(net, example, structure)


def measured(net, example, structure, costs, **options):
    """Return a watch and the table measured by it, on a copy of the network."""
    watch = Watch()
    settings = {"seconds": 0.0, "repeats": 1, "clock": watch} | options
    return watch, LatencyTable.measure(watch.on(copy.deepcopy(net)), example, structure, costs, **settings)


@pytest.fixture(scope="module")
def parts():
    return prepared(Net, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def table(parts):
    return measured(*parts)[1]


@pytest.fixture(scope="module")
def jumpy(parts):
    """A table measured by a clock that jumps at random."""
    times = np.cumsum(np.random.default_rng(0).exponential(1e-3, size=100_000)).tolist()
    return measured(*parts, clock=iter(times).__next__)[1]


class TestPredict:
    def test_the_dense_network_is_as_it_was_measured(self, parts, table):
        net, example, _, _ = parts
        assert table.predict({}) == table.dense.median_ms == pytest.approx(true_ms(net, example))

    @settings(max_examples=30, deadline=None)
    @given(data=st.data())
    def test_between_the_sizes_measured_it_is_bilinear(self, parts, table, data):
        net, example, structure, _ = parts
        removed = {g.name: data.draw(st.integers(0, g.size * 7 // 8), g.name) for g in structure}
        smaller = remove(net, structure, {name: range(number) for name, number in removed.items()})
        assert table.predict(removed) == pytest.approx(true_ms(smaller, example), rel=1e-3)

    def test_an_array_and_a_map_are_alike(self, parts, table):
        counts = np.arange(len(parts[2])) + 1
        assert table.predict(counts) == table.predict(dict(zip(parts[2].names, counts.tolist(), strict=True)))

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_removing_more_never_costs_more(self, parts, jumpy, data):
        structure = parts[2]
        more = {g.name: data.draw(st.integers(0, g.size - 1), f"more of {g.name}") for g in structure}
        less = {name: data.draw(st.integers(0, number), f"less of {name}") for name, number in more.items()}
        assert 0 < jumpy.predict(more) <= jumpy.predict(less) <= jumpy.predict({})

    @pytest.mark.parametrize("left", [8, 6, 4, 3])
    def test_channels_can_be_the_positions_of_a_layer(self, left):
        class OverPixels(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.mixing, self.last = nn.Conv2d(3, 8, 1), nn.Linear(64, 50), nn.Linear(8, 2)

            def forward(self, x):
                return self.last(self.mixing(self.first(x).flatten(2)).mean(2))

        net, example, structure, costs = prepared(OverPixels, torch.ones(1, 3, 8, 8))
        table = measured(net, example, structure, costs)[1]
        smaller = remove(net, structure, {"first": range(8 - left)})
        assert smaller.mixing.weight.shape == (50, 64)
        layers_ms = true_ms(smaller, example) - 1e3 * OVERHEAD
        assert table._layers_ms({"first": 8 - left}) == pytest.approx(layers_ms, rel=1e-4)

    def test_a_network_without_groups(self):
        net, example, structure, _ = prepared(lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.ones(1, 4))
        none = dataclasses.replace(structure, groups=())
        table = measured(net, example, none, CostModel(net, example, none))[1]
        assert table.predict({}) == table.dense.median_ms
        assert [len(sizes) for entry in table.entries for sizes in entry.sizes] == [1, 1, 1, 1]

    def test_a_block_that_goes_takes_its_time_along(self):
        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

            def forward(self, x):
                return x + self.second(torch.relu(self.first(x)))

        net = nn.Sequential(nn.Linear(4, 8), Residual(), nn.Linear(8, 2))
        structure = analyse(net, torch.ones(1, 4), kinds=("channels", "blocks"))
        (block,) = [group for group in structure if group.block is not None]
        parts = net, torch.ones(1, 4), structure, CostModel(net, torch.ones(1, 4), structure)
        table = measured(*parts)[1]
        layers = [table._layers_ms({}), table._layers_ms({block.name: 1})]
        assert layers == pytest.approx([(4 * 8 + 2 * 8 * 16 + 8 * 2) / 1e3, (4 * 8 + 8 * 2) / 1e3])


class TestBudget:
    def test_a_latency_can_be_the_budget(self, parts, table):
        net, example, structure, _ = parts
        costs = CostModel(net, example, structure)
        costs.latency = dataclasses.replace(table, costs=costs)
        limit = 0.5 * table.dense.median_ms
        feasible = FeasibleSet.build(structure, costs, Budget.parse(f"latency<={limit!r}ms"))
        uniform = feasible.uniform()
        assert 0.9 < feasible.utilisation(uniform) <= 1
        assert costs.cost(uniform).latency_ms == table.predict(uniform) <= limit


class TestEntry:
    GRID = st.lists(st.integers(1, 10**9), min_size=12, max_size=12)

    @given(grid=GRID, low=st.tuples(st.integers(1, 50), st.integers(1, 50)), add=st.tuples(*[st.integers(0, 30)] * 2))
    def test_it_never_falls(self, grid, low, add):
        times = np.maximum.accumulate(np.maximum.accumulate(np.array(grid).reshape(4, 3), axis=0), axis=1)
        entry = Entry("any", ((3, 7, 20, 41), (1, 8, 33)), tuple(map(tuple, times.tolist())))
        less, more = Fraction(*entry.numerator(*low)), Fraction(*entry.numerator(low[0] + add[0], low[1] + add[1]))
        assert times[0, 0] <= less <= more <= times[-1, -1]

    def test_numbers_by_hand(self):
        entry = Entry("any", ((2, 4), (10, 20)), ((100, 200), (300, 800)))
        assert [Fraction(*entry.numerator(*at)) for at in [(2, 10), (4, 20), (3, 10), (2, 15), (3, 15)]] == [
            100,
            800,
            200,
            150,
            350,
        ]

    def test_beyond_the_sizes_measured_the_nearest_counts(self):
        entry = Entry("any", ((2, 4), (10, 20)), ((100, 200), (300, 800)))
        assert [Fraction(*entry.numerator(*at)) for at in [(1, 1), (9, 99), (1, 15)]] == [100, 800, 150]


class Grouped(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 24, 3, groups=4), nn.Conv2d(24, 2, 1))


class Multiplied(nn.Sequential):
    """A depthwise convolution with two filters a channel, and transposed ones; that with four groups stays whole."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 1),
            nn.Conv2d(16, 32, 3, groups=16),
            nn.Conv2d(32, 16, 1),
            nn.ConvTranspose2d(16, 16, 2, groups=16),
            nn.Conv2d(16, 8, 1),
            nn.ConvTranspose2d(8, 4, 2, groups=4),
        )


class Lines(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv1d(3, 16, 3), nn.ReLU(), nn.Conv1d(16, 8, 3), nn.Conv1d(8, 2, 1))


class Volumes(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv3d(3, 16, 2), nn.ReLU(), nn.Conv3d(16, 2, 2))


class Tokens(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 2))


SORTS = {
    "all": (Net, (1, 3, 8, 8)),
    "groups": (Grouped, (1, 3, 8, 8)),
    "multiplied": (Multiplied, (1, 3, 8, 8)),
    "lines": (Lines, (2, 3, 9)),
    "volumes": (Volumes, (1, 3, 4, 4, 4)),
    "tokens": (Tokens, (2, 5, 3)),
}


class TestSizes:
    @pytest.mark.parametrize("name", SORTS)
    def test_every_layer_runs_at_every_size(self, name):
        make, shape = SORTS[name]
        net, example, structure, costs = prepared(make, torch.zeros(shape))
        plan = Plan(net, example, structure, costs)
        sites = {site.entry: site for site in plan.sites}
        seen = {}
        for job in plan.jobs:
            made = job.make()
            output = made.module(*made.args, **made.kwargs)
            if sites[job.entry].weight is None:
                continue
            channels = -1 if isinstance(made.module, nn.Linear) else 1
            features = made.module.out_features if channels == -1 else made.module.out_channels
            inputs = made.module.in_features if channels == -1 else made.module.in_channels
            assert output.shape[channels] == features
            assert made.args[0].shape[channels] == inputs
            seen.setdefault(job.entry, set()).add(tuple(made.module.weight.shape[:2]))
        for entry, (_, sizes) in enumerate(plan._labels):
            if sites[entry].weight is not None:
                assert seen[entry] == set(itertools.product(*sizes))

    def test_only_widths_that_shrink_have_several(self, parts):
        table = measured(*parts)[1]
        sizes = {site.module: table.entries[site.entry].sizes for site in table.sites}
        assert sizes["stem"] == ((2, 4, 8, 12, 16), (3,))
        assert sizes["deep"] == ((2, 4, 8, 12, 16), (1,))
        assert sizes["wide"] == ((3, 6, 12, 18, 24), (2, 4, 8, 12, 16))
        assert sizes["up"] == ((3, 6, 12, 18, 24), (1, 2, 4, 6, 8))
        assert sizes["last"] == ((5,), (2, 4, 8, 12, 16))
        assert sizes["act"] == ((128, 256, 512, 768, 1024), (1,))

    def test_equal_calls_are_measured_once(self, parts):
        entries = {site.module: site.entry for site in measured(*parts)[1].sites}
        assert entries["b"] == entries["c"]
        assert len(set(entries.values())) == len(entries) - 1

    def test_a_module_used_twice_has_a_site_for_each_call(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.pool, self.last = nn.Conv2d(3, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 2, 1)

            def forward(self, x):
                return self.last(self.pool(self.pool(self.first(x))))

        table = measured(*prepared(Twice, torch.zeros(1, 3, 8, 8)))[1]
        pools = [site for site in table.sites if site.module == "pool"]
        assert [(site.nth, table.entries[site.entry].sizes[0][-1]) for site in pools] == [(0, 512), (1, 128)]

    @pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
    def test_the_memory_format_is_kept(self, form):
        net, example, structure, costs = prepared(Grouped, torch.zeros(2, 3, 8, 8))
        plan = Plan(net.to(memory_format=form), example.to(memory_format=form), structure, costs)
        for job in plan.jobs:
            made = job.make()
            assert made.args[0].is_contiguous(memory_format=form)
            assert made.module.weight.is_contiguous(memory_format=form)

    def test_code_of_a_strangers_own_is_measured_in_evenly_cut_networks(self):
        class Mixing(nn.Module):
            def __init__(self):
                super().__init__()
                self.matrix = nn.Parameter(torch.ones(16, 16))

            def forward(self, x):
                return x @ self.matrix

        class Strange(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.mixing, self.last = nn.Linear(4, 16), Mixing(), nn.Linear(16, 2)

            def forward(self, x):
                return self.last(self.mixing(self.first(x)))

        table = measured(*prepared(Strange, torch.ones(1, 4)))[1]
        assert table.approximated == ("mixing: measured in evenly cut networks only, its widths together",)
        (site,) = [site for site in table.sites if site.module == "mixing"]
        assert (site.weight, site.matrices) == (None, ("mixing.matrix",))
        assert table.entries[site.entry].sizes == (tuple(k + k * k for k in (2, 4, 8, 12, 16)), (1,))


class TestMeasure:
    @pytest.mark.usefixtures("global_rng_untouched")
    def test_the_network_stays_as_it_is(self, parts):
        net, example, structure, costs = parts
        net.train()
        net.norm.eval()
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        LatencyTable.measure(net, example, structure, costs, seconds=0, repeats=1)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
        assert [name for name, module in net.named_modules() if not module.training] == ["norm"]
        assert not any(module._forward_pre_hooks for module in net.modules())
        assert all(parameter.requires_grad for parameter in net.parameters())
        net.eval()

    def test_on_the_real_clock(self, parts):
        table = LatencyTable.measure(*parts, seconds=0, repeats=3)
        assert 0 < table.predict({"stem": 15}) <= table.predict({})
        assert (table.dtype, table.torch, table.dense.repeats) == ("float32", torch.__version__, 3)
        assert table.approximated == ()

    def test_a_smaller_network_that_was_measured_slower_counts_as_the_dense_one(self, parts):
        net, example, structure, costs = parts
        watch = Watch()
        slow = watch.on(copy.deepcopy(net))
        slow.register_forward_pre_hook(lambda module, _: watch.work(1.0 / module.stem.weight.shape[0]))
        table = LatencyTable.measure(slow, example, structure, costs, seconds=0, repeats=1, clock=watch)
        assert {whole for _, whole in table.whole_ms} == {table.dense.median_ms}
        assert table.predict({}) == table.dense.median_ms

    def test_three_whole_networks_are_compiled_where_that_is_asked_for(self, parts, monkeypatch):
        compiled = []
        monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
        table = measured(*parts, compiled=True)[1]
        assert table.dense.form == "compiled"
        assert [model.stem.out_channels for model in compiled] == [2, 8, 16]

    @pytest.mark.parametrize(("lasting", "samples"), [(0.0, 1), (0.0105, 4), (99.0, 20)])
    def test_a_size_is_sampled_for_its_share_of_the_time(self, lasting, samples):
        watch = Watch()
        net = watch.on(nn.Sequential(nn.Linear(40, 50)))[0]  # a call takes 2 ms; the first two are warm-up
        job = Job(0, (0, 0), lambda: Arguments(net, (torch.ones(1, 40),), {}))
        job.run(lasting, torch.device("cpu"), watch)
        assert len(job.samples) == samples
        assert job.samples == pytest.approx([2e-3] * samples)

    def test_what_works_in_place_never_takes_its_own_output_again(self):
        seen = []

        class InPlace(nn.Module):
            def forward(self, x):
                seen.append(float(x))
                return x.mul_(0.5)

        watch = Watch()
        holder = nn.Sequential(InPlace())
        holder[0].register_forward_pre_hook(lambda *_: watch.work(1.0))
        arguments = Arguments(holder[0], (torch.ones(1),), {})
        Job(0, (0, 0), lambda: arguments).run(99.0, torch.device("cpu"), watch)
        assert seen == [1.0] * 22


class TestFile:
    def test_it_is_read_as_it_was_written(self, parts, table, tmp_path):
        table.save(tmp_path / "latency.json")
        again = LatencyTable.load(tmp_path / "latency.json", parts[3])
        assert again.to_dict() == table.to_dict()
        assert (again.entries, again.sites, again.whole_ms, again.dense) == (
            table.entries,
            table.sites,
            table.whole_ms,
            table.dense,
        )
        assert again.predict({"stem": 3, "wide": 5}) == table.predict({"stem": 3, "wide": 5})

    def test_another_network_is_refused(self, table):
        costs = prepared(Lines, torch.zeros(1, 3, 9))[3]
        with pytest.raises(
            ConfigError, match="the latency table is another network's: it has `stem`; measure it again"
        ):
            LatencyTable.from_dict(table.to_dict(), costs)

    def test_another_width_is_refused(self, table):
        class Wider(Net):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(8, 20), nn.Linear(20, 16)

        costs = prepared(Wider, torch.zeros(1, 3, 8, 8))[3]
        message = r"another network's: `a` has sizes \(16, 8, 1\) in it, \(20, 8, 1\) here; measure it again"
        with pytest.raises(ConfigError, match=message):
            LatencyTable.from_dict(table.to_dict(), costs)

    def test_another_input_is_refused(self, table):
        costs = prepared(Net, torch.zeros(1, 3, 16, 16))[3]
        with pytest.raises(ConfigError, match=r"`stem` has sizes \(16, 3, 64\) in it, \(16, 3, 256\) here"):
            LatencyTable.from_dict(table.to_dict(), costs)

    @pytest.mark.parametrize("text", ["", "no JSON"])
    def test_what_is_no_json(self, parts, tmp_path, text):
        (tmp_path / "latency.json").write_text(text)
        with pytest.raises(ConfigError, match=r"can't read the latency table .*latency.json: "):
            LatencyTable.load(tmp_path / "latency.json", parts[3])

    def test_what_is_not_there(self, parts, tmp_path):
        with pytest.raises(ConfigError, match=r"can't read the latency table .*latency.json: .*No such file"):
            LatencyTable.load(tmp_path / "latency.json", parts[3])

    @pytest.mark.parametrize("format", [0, "1", None])
    def test_another_format(self, parts, table, format):
        with pytest.raises(ConfigError, match=f"a latency table of format {format} can't be read; measure it again"):
            LatencyTable.from_dict({**table.to_dict(), "format": format}, parts[3])

    @pytest.mark.parametrize(
        "change",
        [{"dense": {}}, {"whole_ms": [[1]]}, {"sites": [{}]}, {"entries": 3}, {"sites": [{"odd": 1}]}],
        ids=str,
    )
    def test_what_is_no_table(self, parts, table, change):
        with pytest.raises(ConfigError, match=r"this is no latency table: .*; measure it again"):
            LatencyTable.from_dict({**table.to_dict(), **change}, parts[3])

    def test_it_is_json(self, table):
        assert json.loads(json.dumps(table.to_dict())) == table.to_dict() | {
            "entries": json.loads(json.dumps([dataclasses.asdict(entry) for entry in table.entries])),
            "sites": json.loads(json.dumps([dataclasses.asdict(site) for site in table.sites])),
        }


class TestCheck:
    def checked(self, parts, speed):
        net, example, structure, _ = parts
        watch, table = measured(*parts)
        watch.speed = speed
        policies = [Policy({structure.names[0]: 0.5}), Policy({name: 0.3 for name in structure.names})]
        return check(
            table, watch.on(copy.deepcopy(net)), structure, example, policies, warmup=1, repeats=2, clock=watch
        )

    def test_predictions_are_compared_with_measurement(self, parts):
        errors = self.checked(parts, 1.0)
        assert [row.measured.repeats for row in errors.rows] == [2, 2]
        assert errors.worst == pytest.approx(0, abs=1e-3)
        assert errors.drift == pytest.approx(0, abs=1e-9)

    def test_a_machine_that_slowed_down_is_told_from_a_bad_table(self, parts):
        errors = self.checked(parts, 0.5)
        assert (errors.median, errors.worst) == pytest.approx((0.5, 0.5), abs=1e-3)
        assert errors.drift == pytest.approx(1.0)
        assert errors.median_without_drift == pytest.approx(0, abs=2e-3)
        assert str(errors).startswith("predicted latency is off by 50.0% (median) and 50.0% (worst) over 2 measured")
        assert "the dense network's has changed by +100.0%, without which the median is 0." in str(errors)

    def test_a_bad_table_shows(self, parts):
        net, example, structure, _ = parts
        watch, table = measured(*parts)
        flat = [
            dataclasses.replace(entry, times_ns=tuple((times[-1],) * len(times) for times in entry.times_ns))
            for entry in table.entries
        ]
        wrong = dataclasses.replace(table, entries=tuple(flat))
        policies = [Policy({structure.names[0]: 0.5})]
        errors = check(wrong, watch.on(copy.deepcopy(net)), structure, example, policies, repeats=1, clock=watch)
        assert errors.median_without_drift > 0.2

    def test_its_record(self, parts):
        values = self.checked(parts, 1.0).to_dict()
        assert values["rows"][0]["measured"]["median_ms"] == pytest.approx(values["rows"][0]["predicted_ms"], rel=1e-3)
        assert set(values) == {
            "median_error",
            "worst_error",
            "drift",
            "median_error_without_drift",
            "dense",
            "dense_predicted_ms",
            "rows",
        }
        json.dumps(values)

    def test_no_policy(self, parts, table):
        with pytest.raises(ConfigError, match="is checked on policies, but got none; give at least one"):
            check(table, *parts[:1], parts[2], parts[1], [])


class TestSite:
    def test_positions_are_what_a_weight_is_applied_at(self):
        @dataclasses.dataclass
        class Made:
            module: str
            inputs: tuple

        convolution = Site("a", 0, 0, "a.weight", channels=-3)
        linear = Site("a", 0, 0, "a.weight", channels=-1)
        other = Site("a", 0, 0, None)
        assert convolution.positions_of(Made("a", ((1, 3, 8, 9),))) == 72
        assert linear.positions_of(Made("a", ((1, 5, 3),))) == 5
        assert other.positions_of(Made("a", ((1, 5, 3), (2,)))) == 1
        assert other.sizes(Made("a", ((1, 5, 3), (2,))), lambda name: ()) == (17, 1)
