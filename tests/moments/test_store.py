import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.errors import RunError
from autoprune.moments import Moments, readers_of
from autoprune.moments.solve import regularised
from autoprune.structure import analyse
from autoprune.testing import TinyNet, TinyResNet

FLOAT = torch.float64
ALL = 10**6  # rows of a sample, so that all are looked at


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Grouped(nn.Module):
    """Two convolutions, the second strided and in groups, and a linear layer behind a flatten."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 3 * 2, 5, bias=False)

    def forward(self, x):
        return self.fc(self.norm(self.second(self.first(x).relu())).relu().flatten(1))


class Tokens(nn.Module):
    """Products with parameters: `(batch, tokens, 3)` to `(batch, tokens, 2)`, widths 3, 20 and 7."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(shape)) for shape in ((3, 20), (20, 7), (7, 2)))

    def forward(self, x):
        return ((x @ self.a).relu() @ self.b).relu() @ self.c


def batches(*sizes, shape=(2, 6, 4), dtype=FLOAT):
    return [(torch.randn(size, *shape, dtype=dtype), torch.zeros(size)) for size in sizes]


def collected(model, data, wanted=None, **settings):
    return Moments.collect(model, data, wanted or dict(model.named_parameters()), **settings)


def brute(rows, centred):
    """Return mean and second moments of `(groups, n, d)`."""
    mean = rows.mean(1)
    rows = rows - mean[:, None] if centred else rows
    return mean, rows.transpose(1, 2) @ rows / rows.shape[1]


class TestCollect:
    def test_moments_are_those_of_all_rows(self):
        net, data = Grouped().double().eval(), batches(3, 2)
        moments = collected(net, data, each=ALL)
        inputs = torch.cat([x for x, _ in data])
        with torch.no_grad():
            hidden = net.first(inputs).relu()
            flat = net.norm(net.second(hidden)).relu().flatten(1)
        patches = F.unfold(inputs, 3, padding=1)  # (n, 18, positions)
        halves = [F.unfold(half, 3, padding=1, stride=2) for half in hidden.chunk(2, 1)]
        rows = {
            "first.weight": patches.transpose(1, 2).reshape(1, -1, 18),
            "second.weight": torch.stack([half.transpose(1, 2).reshape(-1, 27) for half in halves]),
            "fc.weight": flat[None],
        }
        assert list(moments) == list(rows)
        for name, expected in rows.items():
            layer = moments[name]
            mean, second = brute(expected, centred=name != "fc.weight")
            torch.testing.assert_close(layer.mean, mean, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(layer.second, second, rtol=1e-10, atol=1e-12)
            assert layer.rows == expected.shape[1]
            assert layer.samples is None

    def test_what_is_known_of_a_layer(self):
        moments = collected(Grouped().double().eval(), batches(2))
        facts = {name: (layer.bias, layer.norm, layer.input_dim, layer.centred) for name, layer in moments.items()}
        assert facts == {
            "first.weight": ("first.bias", None, 1, True),
            "second.weight": (None, "norm", 1, True),
            "fc.weight": (None, None, 1, False),
        }

    def test_moments_with_their_ridge(self):
        moments = collected(Grouped().double().eval(), batches(4))
        for name, groups in (("second.weight", 2), ("fc.weight", 1)):
            layer = moments[name]
            for group in range(groups):
                assert torch.equal(layer.bare_moments(group), layer.second[group])
                assert torch.equal(layer.moments(group), regularised(layer.second[group], layer.rows))

    def test_some_rows_are_looked_at_and_the_seed_says_which(self):
        net, data = Grouped().eval(), batches(3, 2, dtype=torch.float32)
        one, same, other = (collected(net, data, each=4, seed=seed) for seed in (1, 1, 2))
        assert {name: layer.rows for name, layer in one.items()} == {
            "first.weight": 20,
            "second.weight": 20,
            "fc.weight": 5,
        }
        assert all(torch.equal(one[name].second, same[name].second) for name in one)
        assert not torch.equal(one["first.weight"].second, other["first.weight"].second)

    def test_only_what_is_wanted(self):
        moments = collected(Grouped().double().eval(), batches(2), ["fc.weight"])
        assert list(moments) == ["fc.weight"]
        assert moments.notes == ()

    def test_matrix(self):
        net = Grouped().double().eval()
        moments = collected(net, batches(2))
        assert torch.equal(moments["second.weight"].matrix(net.second.weight), net.second.weight.reshape(2, 2, 27))
        tokens = Tokens().double()
        found = collected(tokens, batches(2, shape=(5, 3)))["b"]
        assert found.input_dim == 0
        assert torch.equal(found.matrix(tokens.b), tokens.b.T[None])

    def test_a_weight_that_runs_twice_has_the_rows_of_both(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.second = nn.Linear(3, 3), nn.Parameter(torch.zeros(3))

            def forward(self, x):
                return F.linear(self.fc(x).relu(), self.fc.weight, self.fc.bias if self.training else self.second)

        net, data = Twice().double().eval(), batches(4, shape=(3,))
        layer = collected(net, data)["fc.weight"]
        with torch.no_grad():
            rows = torch.cat([data[0][0], net.fc(data[0][0]).relu()])
        torch.testing.assert_close(layer.second, brute(rows[None], centred=False)[1])
        assert layer.bias is None  # they differ, so that neither can make up for a shift of both

    def test_a_weight_that_runs_both_ways_is_left_out_and_it_is_said(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(5, 3))

            def forward(self, x):
                return F.linear(x, self.weight).relu() @ self.weight

        moments = collected(Tied().double(), batches(4, shape=(3,)))
        assert list(moments) == []
        assert moments.notes == ("what weight reads was not seen",)

    def test_a_weight_that_never_runs_is_noted(self):
        net = TinyNet()
        net.spare = nn.Linear(3, 2)
        moments = collected(net, batches(2, shape=(1, 8, 8), dtype=torch.float32), ["fc.weight", "spare.weight"])
        assert list(moments) == ["fc.weight"]
        assert moments.notes == ("what spare.weight reads was not seen",)

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_the_network_is_not_changed(self):
        with torch.random.fork_rng(devices=[]):
            net, data = TinyNet().train(), batches(3, shape=(1, 8, 8), dtype=torch.float32)
        net.bn1.eval()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        in_training = collected(net, data)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert (net.training, net.bn1.training, net.bn2.training) == (True, False, True)
        in_eval = collected(net.eval(), data)
        assert all(torch.equal(in_training[name].second, in_eval[name].second) for name in in_eval)

    def test_half_precision_is_summed_in_single(self):
        moments = collected(TinyNet().bfloat16(), batches(3, shape=(1, 8, 8), dtype=torch.bfloat16))
        assert all(layer.second.dtype == layer.mean.dtype == torch.float32 for layer in moments.values())

    def test_nothing_but_zeros(self):
        moments = collected(TinyNet(), [(torch.zeros(2, 1, 8, 8), torch.zeros(2))])
        assert moments["conv1.weight"].moments(0).tolist() == torch.eye(9).tolist()

    def test_a_far_mean_does_not_hide_the_spread(self):
        """A feature that lies at 3000 and moves by 1 has a variance, though its square has no room for it."""
        net = nn.Linear(4, 2)
        data = batches(50, 50, shape=(4,), dtype=torch.float32)
        moved = [(inputs + torch.tensor([0.0, 0.0, 0.0, 3000.0]), targets) for inputs, targets in data]
        bare = [collected(net, one)["weight"].bare_moments(0) for one in (data, moved)]
        torch.testing.assert_close(bare[1], bare[0], rtol=1e-2, atol=1e-2)

    def test_one_sample_at_a_time(self):
        net, data = Grouped().double().eval(), batches(1, 1, 1)
        whole = [(torch.cat([inputs for inputs, _ in data]), torch.zeros(3))]
        one, all_at_once = (collected(net, each, each=ALL) for each in (data, whole))
        for name in one:
            torch.testing.assert_close(one[name].second, all_at_once[name].second)


class TestReadersOf:
    def test_layers_that_read_a_group_and_weights_that_are_zeroed(self):
        net = TinyResNet()
        assert readers_of(analyse(net, torch.zeros(1, 1, 8, 8))) == {"conv1.weight", "conv2.weight", "fc.weight"}
        weights = readers_of(analyse(net, torch.zeros(1, 1, 8, 8), kinds=("weights",)))
        assert weights == {"stem.weight", "conv1.weight", "conv2.weight", "fc.weight"}


def nbytes(moments):
    tensors = [value for layer in moments.values() for value in (layer.mean, layer.second, layer.samples)]
    return sum(value.nbytes for value in tensors if value is not None)


class TestMemory:
    """Moments of `Tokens` take 3 (3 + 1) + 20 (20 + 1) + 7 (7 + 1) = 488 floats."""

    def test_with_enough_of_it_all_are_kept(self):
        moments = collected(Tokens(), batches(300, shape=(2, 3), dtype=torch.float32), memory=488 * 4)
        assert all(layer.samples is None for layer in moments.values())
        assert moments.notes == ()
        assert nbytes(moments) == 488 * 4

    def test_of_the_widest_layer_rows_are_kept(self):
        net, data = Tokens(), batches(40, 20, shape=(2, 3), dtype=torch.float32)
        moments = collected(net, data, memory=487 * 4, each=ALL)
        # 12 + 56 floats for the others, 20 for its mean: room for 19 rows of 20
        assert {name: layer.samples is not None for name, layer in moments.items()} == {
            "a": False,
            "b": True,
            "c": False,
        }
        assert moments["b"].samples.shape == (1, 19, 20)

    @pytest.mark.parametrize("dtype", [torch.float32, FLOAT])
    @pytest.mark.parametrize("memory", [500, 800, 1500, 1900, 3000])
    def test_it_is_never_exceeded(self, memory, dtype):
        net, data = Tokens().to(dtype), batches(40, 20, 4, shape=(2, 3), dtype=dtype)
        assert nbytes(collected(net, data, memory=memory)) <= memory

    def test_groups_count(self):
        """A depthwise layer of 16 channels has 16 times 9 x 9 moments, more than the pointwise one of 10 x 10."""
        net = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 10, 1), nn.Conv2d(10, 2, 1))
        data = batches(2, shape=(16, 4, 4), dtype=torch.float32)
        moments = collected(net, data, memory=(16 * 9 + 16 + 10 + 16 * 16 + 10 * 10 + 2 * 16 * 9) * 4)
        assert {name: layer.samples is not None for name, layer in moments.items()} == {
            "0.weight": True,
            "1.weight": False,
            "2.weight": False,
        }
        assert moments["0.weight"].samples.shape == (16, 2, 9)

    def test_rows_are_those_that_the_layer_reads(self):
        net, data = Tokens(), batches(100, 60, shape=(2, 3), dtype=torch.float32)
        moments = collected(net, data, memory=100 + 4 * (12 + 56 + 20 + 20 * 10), each=ALL)
        layer = moments["b"]
        assert (layer.second, layer.rows) == (None, 320)
        with torch.no_grad():
            hidden = torch.cat([(x @ net.a).relu().flatten(0, 1) for x, _ in data])
        read = {tuple(row) for row in hidden.tolist()}
        kept = [tuple(row) for row in layer.samples[0].tolist()]
        assert set(kept) <= read
        assert len(set(kept)) == len(kept) == 11
        torch.testing.assert_close(layer.mean[0], hidden.mean(0), rtol=1e-4, atol=1e-5)

    def test_it_is_said(self):
        net, data = Tokens(), batches(8, shape=(2, 3), dtype=torch.float32)
        moments = collected(net, data, memory=4 * (12 + 56 + 20 + 20 * 8))
        assert moments.notes == ("b reads 20 inputs: 8 rows are kept in place of their moments",)

    def test_asking_for_what_was_not_kept(self):
        moments = collected(Tokens(), batches(8, shape=(2, 3), dtype=torch.float32), memory=4 * (12 + 56 + 20 + 160))
        with pytest.raises(ValueError, match="b has rows in place of moments"):
            moments["b"].moments(0)
        with pytest.raises(ValueError, match="a has moments in place of rows"):
            moments["a"].centred_samples(0)

    def test_rows_about_their_mean(self):
        net = nn.Sequential(nn.Linear(20, 3), nn.Linear(3, 2, bias=False)).double()
        moments = collected(net, batches(8, shape=(20,)), memory=8 * (20 + 3) * (1 + 2))
        for name, centred in (("0.weight", True), ("1.weight", False)):
            samples = moments[name].samples[0]
            expected = samples - samples.mean(0) if centred else samples
            torch.testing.assert_close(moments[name].centred_samples(0), expected)


class TestFiles:
    @pytest.fixture
    def moments(self):
        net, data = Tokens(), batches(8, shape=(2, 3), dtype=torch.float32)
        return collected(net, data, {"a", "b", "spare"}, memory=4 * (12 + 20 + 20 * 8))

    def test_what_was_written_is_read(self, moments, tmp_path):
        moments.save(tmp_path / "moments", {"network": "one"})
        read = Moments.load(tmp_path / "moments", {"network": "one"})
        assert list(read) == list(moments) == ["a", "b"]
        assert read.notes == moments.notes
        assert len(read.notes) == 1
        for name, layer in moments.items():
            for field in dataclasses.fields(layer):
                old, new = getattr(layer, field.name), getattr(read[name], field.name)
                assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new, field.name
        assert [path.name for path in tmp_path.glob("*moments*")] == ["moments"]

    def test_of_another_network_or_other_data_it_is_refused(self, moments, tmp_path):
        moments.save(tmp_path / "moments", {"network": "one"})
        with pytest.raises(RunError, match="moments of another network or other data; move it away"):
            Moments.load(tmp_path / "moments", {"network": "two"})

    @pytest.mark.parametrize("damage", ["garbage", "empty", "cut", "gone", "other"])
    def test_what_is_no_such_file_is_refused(self, moments, tmp_path, damage):
        path = tmp_path / "moments"
        moments.save(path, {})
        if damage == "gone":
            path.unlink()
        elif damage == "other":
            from safetensors.torch import save_file

            save_file({"weight": torch.zeros(2)}, path)
        else:
            path.write_bytes({"garbage": b"x" * 1000, "empty": b"", "cut": path.read_bytes()[:-10]}[damage])
        with pytest.raises(RunError, match="holds no moments"):
            Moments.load(path, {})
