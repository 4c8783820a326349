"""What a run shows, on networks so small that every element, product and byte is written out by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoprune.errors import StructureError
from autoprune.structure.channels import find_channels
from autoprune.structure.trace import in_mode, trace
from autoprune.structure.tracer import tensors

IMAGES = torch.zeros(1, 2, 4, 4)
TOKENS = torch.zeros(1, 3, 4)
IDS = torch.tensor([[1, 2]])
OUTPUT = "its elements are the network's output"


class Net(nn.Module):
    """Modules or parameters, and how the input goes through them."""

    def __init__(self, run, **members):
        super().__init__()
        self.run = run
        for name, member in members.items():
            if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 1, bias=False, **options)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def between(run, width=3, after=None, **members):
    """A network `a` → what is given → `b`, the output, both 1×1 convolutions without a bias."""
    return Net(lambda net, x: net.b(run(net, net.a(x))), a=conv(2, width), b=conv(after or width, 2), **members)


def found(net, example=IMAGES, **options):
    """The elements of every group by tensor and dimension, in short where an element is one index."""
    groups = find_channels(net, trace(net, example), **options).groups
    return {group.name: {written(part): short(part) for part in group.slices} for group in groups}


def written(part):
    return f"{part.tensor} {part.dim}" + (" read" if part.role == "read" else "")


def short(part):
    rows = part.positions.tolist()
    return [row[0] for row in rows] if part.positions.shape[1] == 1 else rows


def locked(net, example=IMAGES, **options):
    return {group.name: group.reason for group in find_channels(net, trace(net, example), **options).locked}


class TestLayers:
    def test_one_convolution(self):
        net = nn.Sequential(conv(2, 3))
        assert found(net) == {}
        assert locked(net) == {"0": OUTPUT}

    def test_a_chain_with_a_norm(self):
        net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 2))
        of_norm = {f"1.{name} 0": [0, 1, 2] for name in ("weight", "bias", "running_mean", "running_var")}
        expected = {"0.weight 0": [0, 1, 2], "0.bias 0": [0, 1, 2], **of_norm, "3.weight 1 read": [0, 1, 2]}
        assert found(net) == {"0": expected}
        assert locked(net) == {"3": OUTPUT}

    @pytest.mark.parametrize(
        ("norm", "each"),
        [(nn.InstanceNorm2d(4, affine=True), [0, 1, 2, 3]), (nn.GroupNorm(2, 4), [[0, 1], [2, 3]])],
        ids=["instance", "group"],
    )
    def test_norms_that_leave_channels_apart(self, norm, each):
        expected = {"a.weight 0": each, "norm.weight 0": each, "norm.bias 0": each, "b.weight 1 read": each}
        assert found(between(lambda net, x: net.norm(x), width=4, norm=norm)) == {"a": expected}

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_convolutions_and_pooling_over_any_number_of_dimensions(self, dims):
        kinds = {1: (nn.Conv1d, nn.MaxPool1d), 2: (nn.Conv2d, nn.AvgPool2d), 3: (nn.Conv3d, nn.MaxPool3d)}
        conv, pool = kinds[dims]
        net = nn.Sequential(conv(2, 3, 1), pool(2), nn.PReLU(3), nn.Upsample(scale_factor=2), conv(3, 2, 1))
        rows = [0, 1, 2]
        expected = {"0.weight 0": rows, "0.bias 0": rows, "2.weight 0": rows, "4.weight 1 read": rows}
        assert found(net, torch.zeros(1, 2, *[4] * dims)) == {"0": expected}

    def test_transposed(self):
        net = nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.ConvTranspose2d(3, 2, 2))
        assert found(net) == {"0": {"0.weight 1": [0, 1, 2], "0.bias 0": [0, 1, 2], "1.weight 0 read": [0, 1, 2]}}

    def test_linear_layers_behind_a_flatten(self):
        net = nn.Sequential(conv(2, 2), nn.Flatten(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2))
        assert found(net, torch.zeros(1, 2, 2, 2)) == {
            "0": {"0.weight 0": [0, 1], "2.weight 1 read": [[0, 1, 2, 3], [4, 5, 6, 7]]},
            "2": {"2.weight 0": [0, 1, 2], "2.bias 0": [0, 1, 2], "4.weight 1 read": [0, 1, 2]},
        }

    def test_depthwise(self):
        net = nn.Sequential(conv(2, 3), conv(3, 6, groups=3), conv(6, 2))
        pairs = [[0, 1], [2, 3], [4, 5]]
        assert found(net) == {"0": {"0.weight 0": [0, 1, 2], "1.weight 0": pairs, "2.weight 1 read": pairs}}
        (group,) = find_channels(net, trace(net, IMAGES)).groups
        ((module, name, each),) = [(a.module, a.name, a.each) for a in group.attributes]
        assert (module, name, each) == ("1", "groups", 1)

    def test_many_small_groups_leave_whole(self):
        net = nn.Sequential(conv(2, 6), conv(6, 6, groups=3), conv(6, 2))
        pairs = [[0, 1], [2, 3], [4, 5]]
        assert found(net) == {"0": {"0.weight 0": pairs, "1.weight 0": pairs, "2.weight 1 read": pairs}}

    def test_few_large_groups_lose_the_same_of_each(self):
        net = nn.Sequential(conv(2, 6), conv(6, 4, groups=2), conv(4, 2))
        assert found(net) == {
            "0": {"0.weight 0": [[0, 3], [1, 4], [2, 5]], "1.weight 1 read": [0, 1, 2]},
            "1": {"1.weight 0": [[0, 2], [1, 3]], "2.weight 1 read": [[0, 2], [1, 3]]},
        }

    def test_groups_that_read_the_input(self):
        net = nn.Sequential(conv(2, 4, groups=2), conv(4, 2))
        assert found(net) == {"0": {"0.weight 0": [[0, 2], [1, 3]], "1.weight 1 read": [[0, 2], [1, 3]]}}
        net = nn.Sequential(conv(2, 2, groups=2), conv(2, 2))
        assert locked(net)["0"] == "it goes with the network's input"

    @pytest.mark.parametrize(("groups", "rows"), [(2, [[0, 1], [2, 3]]), (4, [0, 1, 2, 3])])
    def test_transposed_in_groups(self, groups, rows):
        net = nn.Sequential(conv(2, 4), nn.ConvTranspose2d(4, 8, 1, groups=groups, bias=False), conv(8, 2))
        wide = torch.arange(8).reshape(groups, -1).tolist()
        assert found(net) == {"0": {"0.weight 0": rows, "1.weight 0": rows, "2.weight 1 read": wide}}

    def test_an_embedding(self):
        net = nn.Sequential(nn.Embedding(7, 3), linear(3, 2))
        assert found(net, IDS) == {"0": {"0.weight 1": [0, 1, 2], "1.weight 1 read": [0, 1, 2]}}

    def test_an_embedding_that_is_also_the_last_layer(self):
        net = nn.Sequential(nn.Embedding(7, 3), nn.ReLU(), linear(3, 7))
        net[2].weight = net[0].weight
        assert found(net, IDS) == {"0": {"0.weight 1 read": [0, 1, 2]}}
        assert locked(net, IDS) == {"0#2": "`0` looks its rows up"}

    def test_a_layer_that_runs_twice(self):
        net = between(lambda net, x: net.again(F.relu(net.again(x))), again=conv(3, 3))
        rows = [0, 1, 2]
        expected = {"a.weight 0": rows, "again.weight 0": rows, "again.weight 1 read": rows, "b.weight 1 read": rows}
        assert found(net) == {"a": expected}

    def test_a_layer_that_does_not_run(self):
        net = between(lambda net, x: x, spare=nn.Linear(9, 5))
        assert locked(net)["spare"] == "the network does not use it when it runs on the example input"


class TestTopologies:
    def test_residual(self):
        net = between(lambda net, x: x + net.inner(x), inner=conv(3, 3))
        rows = [0, 1, 2]
        expected = {"a.weight 0": rows, "inner.weight 0": rows, "inner.weight 1 read": rows, "b.weight 1 read": rows}
        assert found(net) == {"a": expected}

    def test_concatenation(self):
        net = between(lambda net, x: torch.cat([x, net.inner(x)], 1), after=5, inner=conv(3, 2))
        assert found(net) == {
            "a": {"a.weight 0": [0, 1, 2], "inner.weight 1 read": [0, 1, 2], "b.weight 1 read": [0, 1, 2]},
            "inner": {"inner.weight 0": [0, 1], "b.weight 1 read": [3, 4]},
        }

    def test_concatenation_over_space(self):
        net = between(lambda net, x: torch.cat([x, x], 3))
        assert found(net) == {"a": {"a.weight 0": [0, 1, 2], "b.weight 1 read": [0, 1, 2]}}

    def test_a_stack_that_is_summed(self):
        net = between(lambda net, x: torch.stack([x, net.inner(x)]).sum(0), inner=conv(3, 3))
        assert found(net)["a"]["inner.weight 0"] == [0, 1, 2]

    def test_gates(self):
        pairs = {"a.weight 0": [[0, 3], [1, 4], [2, 5]], "b.weight 1 read": [0, 1, 2]}
        assert found(between(lambda net, x: F.glu(x, 1), width=6, after=3)) == {"a": pairs}
        halves = between(lambda net, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(), width=6, after=3)
        assert found(halves) == {"a": pairs}

    def test_squeeze_and_excitation(self):
        def run(net, x):
            return x * net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))).sigmoid()

        assert found(between(run, down=conv(3, 2), up=conv(2, 3))) == {
            "a": {
                "a.weight 0": [0, 1, 2],
                "down.weight 1 read": [0, 1, 2],
                "up.weight 0": [0, 1, 2],
                "b.weight 1 read": [0, 1, 2],
            },
            "down": {"down.weight 0": [0, 1], "up.weight 1 read": [0, 1]},
        }

    def test_a_gate_over_space_that_is_expanded(self):
        net = between(lambda net, x: x * net.gate(x).sigmoid().expand_as(x), gate=conv(3, 1))
        assert found(net)["a"]["b.weight 1 read"] == [0, 1, 2]

    def test_in_place(self):
        net = between(lambda net, x: x.relu_().mul_(2).add_(net.other(x)), other=conv(3, 3))
        assert found(net)["a"]["other.weight 0"] == [0, 1, 2]
        net = between(lambda net, x: x.clone().copy_(net.other(x)), other=conv(3, 3))
        assert found(net)["a"]["other.weight 0"] == [0, 1, 2]


class TestParametersOfTheNetwork:
    def test_a_matrix(self):
        net = Net(
            lambda net, x: net.b(torch.einsum("bnc,cd->bnd", net.a(x), net.w)),
            a=linear(4, 3),
            b=linear(2, 2),
            w=nn.Parameter(torch.ones(3, 2)),
        )
        assert found(net, TOKENS) == {
            "a": {"a.weight 0": [0, 1, 2], "w 0 read": [0, 1, 2]},
            "w": {"w 1": [0, 1], "b.weight 1 read": [0, 1]},
        }

    def test_a_scale(self):
        net = between(lambda net, x: x * net.scale, scale=nn.Parameter(torch.ones(3, 1, 1)))
        assert found(net) == {"a": {"a.weight 0": [0, 1, 2], "scale 0": [0, 1, 2], "b.weight 1 read": [0, 1, 2]}}

    def test_one_number(self):
        net = between(lambda net, x: x * net.scale, scale=nn.Parameter(torch.ones(())))
        assert found(net) == {"a": {"a.weight 0": [0, 1, 2], "b.weight 1 read": [0, 1, 2]}}

    def test_a_buffer(self):
        net = Net(
            lambda net, x: net.b(net.a(x) + net.place[:, : x.shape[1]]),
            a=linear(4, 3),
            b=linear(3, 2),
            place=torch.ones(1, 9, 3),
        )
        assert found(net, TOKENS) == {
            "a": {"a.weight 0": [0, 1, 2], "place 2": [0, 1, 2], "b.weight 1 read": [0, 1, 2]}
        }

    def test_a_tensor_of_no_name(self):
        net = between(lambda net, x: x + torch.ones(3, 1, 1))
        assert locked(net)["a"] == "the network's own code combines it with a tensor of a fixed size"

    def test_weights_that_are_standardised(self):
        def weights(net):
            w = net.inner.weight
            return (w - w.mean((1, 2, 3), keepdim=True)) / w.var((1, 2, 3), keepdim=True).sqrt()

        net = between(lambda net, x: F.conv2d(x, weights(net)), after=2, inner=conv(3, 2))
        assert found(net) == {"inner": {"inner.weight 0": [0, 1], "b.weight 1 read": [0, 1]}}
        assert "normalises across it" in locked(net)["a"]
        assert found(net, normalised=True)["a"] == {"a.weight 0": [0, 1, 2], "inner.weight 1 read": [0, 1, 2]}


class TestRearrangement:
    def test_permutations_and_reshapes_that_keep_channels_together(self):
        def run(net, x):
            batch, channels, height, width = x.shape
            x = x.permute(0, 2, 3, 1).reshape(batch, -1, channels).transpose(1, 2)
            return x.view(batch, channels, height, width).flip(3).roll(1, 2)

        assert found(between(run)) == {"a": {"a.weight 0": [0, 1, 2], "b.weight 1 read": [0, 1, 2]}}

    def test_a_reversal_of_the_channels(self):
        net = between(lambda net, x: x.flip(1))
        assert found(net) == {"a": {"a.weight 0": [0, 1, 2], "b.weight 1 read": [2, 1, 0]}}

    @pytest.mark.parametrize(
        ("shuffle", "how"),
        [
            (lambda net, x: x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2), "reshapes the 6 of them into 2 × 3"),
            (lambda net, x: F.channel_shuffle(x, 2), "shuffles the 6 of them as 2 × 3"),
        ],
        ids=["reshape", "operator"],
    )
    def test_a_channel_shuffle_lets_no_channel_go(self, shuffle, how):
        net = between(shuffle, width=6)
        assert found(net) == {}
        assert locked(net)["a"] == f"the network's own code {how}, of which it is neither whole rows nor whole columns"

    def test_a_channel_shuffle_between_convolutions_in_as_many_groups(self):
        def run(net, x):
            return net.outer(net.inner(x).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2))

        net = between(run, width=4, inner=conv(4, 4, groups=2), outer=conv(4, 4, groups=2))
        # whole groups of `inner` are rows of the shuffle, those of `outer` are columns: together they are everything
        assert locked(net)["a"] == "it has one element only, and a layer is never emptied"

    def test_rows_of_a_reshape_may_go(self):
        net = between(lambda net, x: x.unflatten(1, (3, -1)).sum(2), width=6, after=3)
        assert found(net) == {"a": {"a.weight 0": [[0, 1], [2, 3], [4, 5]], "b.weight 1 read": [0, 1, 2]}}

    def test_a_pixel_shuffle(self):
        net = between(lambda net, x: F.pixel_shuffle(x, 2), width=8, after=2)
        assert found(net) == {"a": {"a.weight 0": [[0, 1, 2, 3], [4, 5, 6, 7]], "b.weight 1 read": [0, 1]}}

    def test_pixels_into_channels(self):
        net = between(lambda net, x: F.pixel_unshuffle(x, 2), width=2, after=8)
        assert found(net) == {"a": {"a.weight 0": [0, 1], "b.weight 1 read": [[0, 1, 2, 3], [4, 5, 6, 7]]}}

    @pytest.mark.parametrize(
        "pick", [lambda x: x.index_select(1, torch.tensor([2, 0])), lambda x: x[:, [2, 0]]], ids=["select", "index"]
    )
    def test_channels_picked_by_number(self, pick):
        net = between(lambda net, x: pick(x), after=2)
        assert found(net) == {"a": {"a.weight 0": [0, 2], "b.weight 1 read": [1, 0]}}
        notes = find_channels(net, trace(net, IMAGES)).notes
        assert notes == {"a": "the network's own code picks 2 of the 3 of them by number"}

    def test_a_part_of_the_channels(self):
        net = Net(
            lambda net, x: net.b((y := net.a(x))[:, :2]) + net.c(y[:, 2:]), a=conv(2, 5), b=conv(2, 2), c=conv(3, 2)
        )
        assert found(net) == {
            "a": {"a.weight 0": [0, 1], "b.weight 1 read": [0, 1]},
            "a#2": {"a.weight 0": [2, 3, 4], "c.weight 1 read": [0, 1, 2]},
        }
        notes = find_channels(net, trace(net, IMAGES)).notes
        assert notes["a"] == "the network's own code splits the 5 of them at 2"

    def test_padding_of_space(self):
        for mode in ("constant", "reflect", "replicate"):
            net = between(lambda net, x, mode=mode: F.pad(x, (1, 1, 1, 1), mode=mode))
            assert found(net) == {"a": {"a.weight 0": [0, 1, 2], "b.weight 1 read": [0, 1, 2]}}

    def test_parts_that_are_copied_into_a_tensor_of_a_fixed_size(self):
        net = between(lambda net, x: F.pad(x, (1, 1, 1, 1), mode="circular"))
        assert locked(net)["a"] == "the network's own code combines it with a tensor of a fixed size"

    def test_padding_of_channels(self):
        net = between(lambda net, x: F.pad(x, (0, 0, 0, 0, 1, 2)), after=6)
        assert found(net) == {"a": {"a.weight 0": [0, 1, 2], "b.weight 1 read": [1, 2, 3]}}

    def test_a_shortcut_that_is_padded_parts_the_stream(self):
        net = between(lambda net, x: F.pad(x, (0, 0, 0, 0, 0, 2)) + net.inner(x), after=5, inner=conv(3, 5))
        rows = [0, 1, 2]
        expected = {"a.weight 0": rows, "inner.weight 0": rows, "inner.weight 1 read": rows, "b.weight 1 read": rows}
        assert found(net)["a"] == expected
        assert locked(net)["inner"] == "the network's own code joins it with padding of a fixed size"


class TestAcrossChannels:
    @pytest.mark.parametrize(
        ("run", "reason"),
        [
            (lambda net, x: x.softmax(1), "the network's own code runs `softmax` across it"),
            (lambda net, x: x.cumsum(1), "the network's own code runs `cumsum` across it"),
            (lambda net, x: net.norm(x), "`norm` runs `avg_pool3d` across it"),
        ],
        ids=["softmax", "cumsum", "local"],
    )
    def test_what_mixes_them_locks_them(self, run, reason):
        assert locked(between(run, norm=nn.LocalResponseNorm(3)))["a"] == reason

    @pytest.mark.parametrize(
        "run",
        [
            lambda net, x: x - x.mean(1, keepdim=True),
            lambda net, x: F.normalize(x, dim=1),
            lambda net, x: x * (x.var() > 0),
            lambda net, x: net.norm(x),
        ],
        ids=["mean", "length", "everything", "norm"],
    )
    def test_norms_are_offered_on_request(self, run):
        net = between(run, norm=nn.GroupNorm(1, 3))
        assert "normalises across it" in locked(net)["a"]
        assert found(net, normalised=True)["a"]["b.weight 1 read"] == [0, 1, 2]

    def test_a_norm_whose_result_nobody_reads_is_none(self):
        def run(net, x):
            x.mean(1)
            return x

        assert list(found(between(run))) == ["a"]

    def test_an_operator_that_is_not_known(self):
        net = between(lambda net, x: torch.fft.fft(x, dim=1).real)
        reason = "the network's own code runs `_fft_r2c` on it, whose effect on channels is not known"
        assert locked(net) == {"a": reason, "b": OUTPUT}
        assert trace(net, IMAGES).unfollowed == {"_fft_r2c": 1}

    def test_weights_that_go_into_one(self):
        net = nn.Sequential(nn.EmbeddingBag(7, 3), linear(3, 2))
        assert locked(net, IDS)["0"] == "`0` runs `_embedding_bag` on it, whose effect on channels is not known"


class Attention(nn.Module):
    """Separate projections; `shared` queries to every key and value."""

    def __init__(self, heads=2, size=2, shared=1):
        super().__init__()
        self.size, self.shared = size, shared
        self.q, self.k, self.v = (linear(4, heads * n * size) for n in (shared, 1, 1))
        self.out = linear(heads * shared * size, 4)

    def forward(self, x):
        q, k, v = (p(x).view(*x.shape[:2], -1, self.size).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(self.shared, 1), v.repeat_interleave(self.shared, 1)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class TestAttention:
    def test_separate_projections(self):
        pairs = [[0, 1], [2, 3]]
        expected = {"q.weight 0": pairs, "k.weight 0": pairs, "v.weight 0": pairs, "out.weight 1 read": pairs}
        net = Attention()
        assert found(net, TOKENS) == {"q": expected}
        (group,) = find_channels(net, trace(net, TOKENS)).groups
        assert (group.kind, group.layers, group.readers) == ("heads", ("q", "k", "v"), ("out",))

    def test_packed_projections(self):
        def run(net, x):
            q, k, v = net.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
            return net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

        net = Net(run, qkv=linear(4, 12), out=linear(4, 4))
        packed = [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
        assert found(net, TOKENS) == {"qkv": {"qkv.weight 0": packed, "out.weight 1 read": [[0, 1], [2, 3]]}}

    def test_queries_that_share_keys(self):
        pairs, fours = [[0, 1], [2, 3]], [[0, 1, 2, 3], [4, 5, 6, 7]]
        expected = {"q.weight 0": fours, "k.weight 0": pairs, "v.weight 0": pairs, "out.weight 1 read": fours}
        assert found(Attention(shared=2), TOKENS) == {"q": expected}

    @pytest.mark.parametrize("need_weights", [True, False])
    def test_torchs_own(self, need_weights):
        net = Net(
            lambda net, x: net.b(net.a(x, x, x, need_weights=need_weights)[0]),
            a=nn.MultiheadAttention(4, 2, bias=False, batch_first=True),
            b=linear(4, 2),
        )
        packed = [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
        assert found(net, TOKENS) == {
            "a": {"a.in_proj_weight 0": packed, "a.out_proj.weight 1 read": [[0, 1], [2, 3]]},
            "a.out_proj": {"a.out_proj.weight 0": [0, 1, 2, 3], "b.weight 1 read": [0, 1, 2, 3]},
        }

    def test_one_head_is_channels(self):
        def run(net, x):
            q, k, v = net.q(x), net.k(x), net.v(x)
            return net.out((q @ k.transpose(1, 2)).softmax(-1) @ v)

        net = Net(run, q=linear(4, 3), k=linear(4, 3), v=linear(4, 2), out=linear(2, 2))
        assert found(net, TOKENS) == {
            "q": {"q.weight 0": [0, 1, 2], "k.weight 0": [0, 1, 2]},
            "v": {"v.weight 0": [0, 1], "out.weight 1 read": [0, 1]},
        }


class TestBlocks:
    @staticmethod
    def blocks(*modules, example=IMAGES):
        return [(block.module, len(block.branches)) for block in trace(nn.Sequential(*modules), example).blocks]

    @staticmethod
    def block(run, **members):
        return Net(run, inner=nn.Sequential(conv(2, 3), nn.ReLU(), conv(3, 2)), **members)

    def test_before_and_after_the_activation(self):
        pre = self.block(lambda net, x: x + net.inner(F.relu(x)))
        post = self.block(lambda net, x: F.relu(net.inner(x) + x))
        assert self.blocks(conv(2, 2), pre, nn.Sequential(post)) == [("1", 1), ("2.0", 1)]

    def test_in_place(self):
        assert self.blocks(conv(2, 2), self.block(lambda net, x: net.inner(x).add_(x))) == [("1", 1)]
        assert self.blocks(conv(2, 2), self.block(lambda net, x: x.clone().add_(net.inner(x)))) == [("1", 1)]

    def test_two_additions(self):
        assert self.blocks(self.block(lambda net, x: (y := x + net.inner(x)) + net.inner(y))) == [("0", 2)]

    def test_blocks_hold_no_others(self):
        inner = self.block(lambda net, x: x + net.inner(x))
        outer = Net(lambda net, x: x + net.block(x), block=inner)
        assert self.blocks(outer) == [("0.block", 1)]

    @pytest.mark.parametrize(
        "run",
        [
            lambda net, x: net.inner(x),
            lambda net, x: net.inner(x) + net.inner(x),
            lambda net, x: x + net.inner(x).mean(1, keepdim=True),
            lambda net, x: (x + net.inner(x)).mean((2, 3), keepdim=True),
            lambda net, x: (x + net.inner(x)).sigmoid(),
            lambda net, x: x * net.inner(x),
            lambda net, x: x + 1,
            lambda net, x: x + x,
            lambda net, x: torch.stack([x, net.inner(x)]).sum(0),
            lambda net, x: (x + net.inner(x),),
        ],
        ids=["chain", "other", "broadcast", "shape", "sigmoid", "product", "constant", "double", "stack", "tuple"],
    )
    def test_what_is_none(self, run):
        assert self.blocks(conv(2, 2), self.block(run)) == []

    def test_the_whole_network_is_none(self):
        assert trace(self.block(lambda net, x: x + net.inner(x)), IMAGES).blocks == []

    def test_which_operand_would_go(self):
        for run, place in ((lambda net, x: x + net.inner(x), 1), (lambda net, x: net.inner(x) + x, 0)):
            traced = trace(nn.Sequential(conv(2, 2), self.block(run), conv(2, 2)), IMAGES)
            (block,) = traced.blocks
            assert traced.operators[block.start : block.end] == [
                "aten::convolution", "aten::relu", "aten::convolution", "aten::add",
            ]  # fmt: skip
            assert block.branches == ((block.end - 1, place),)
            assert [traced.storages[s].born for s in (block.source, block.result)] == [0, block.end - 1]


def numbers(area):
    """What an area amounts to with nothing removed."""
    sizes = {dim: size for dims, labels in area.maps for dim, size in zip(dims, labels.shape, strict=True)}
    return area.fixed * math.prod(sizes.values())


def peak(traced):
    """The most bytes held at once, at any operator."""
    end = len(traced.operators)
    spans = [(max(s.born, 0), min(s.died, end), numbers(s.numel) * s.itemsize) for s in traced.storages]
    return max(sum(size for born, died, size in spans if born <= at < died) for at in range(end))


class TestCosts:
    def test_products(self):
        net = nn.Sequential(nn.Conv2d(2, 3, 3), conv(3, 6, groups=3), nn.Flatten(), nn.Linear(24, 5))
        products = [(p.parameter, numbers(p.macs)) for p in trace(net, IMAGES).products]
        assert products == [("0.weight", 4 * 3 * 2 * 9), ("1.weight", 4 * 6), ("3.weight", 24 * 5)]

    def test_products_between_activations_have_no_parameter(self):
        products = [(p.parameter, numbers(p.macs)) for p in trace(Attention(), TOKENS).products]
        inner = [(None, 2 * 3 * 3 * 2)] * 2
        assert products == [(f"{name}.weight", 3 * 4 * 4) for name in "qkv"] + inner + [("out.weight", 3 * 4 * 4)]

    def test_a_transposed_convolution_counts_its_inputs_positions(self):
        (product,) = trace(nn.ConvTranspose2d(2, 3, 2, stride=2), IMAGES).products
        assert numbers(product.macs) == 16 * 2 * 3 * 4

    def test_memory_of_a_chain(self):
        traced = trace(nn.Sequential(conv(2, 3), nn.ReLU(), conv(3, 2)), IMAGES)
        # the caller holds the input; a result is held till the next one is there
        spans = [(s.born, min(s.died, 3), numbers(s.numel), s.itemsize) for s in traced.storages]
        assert spans == [(-1, 3, 32, 4), (0, 2, 48, 4), (1, 3, 48, 4), (2, 3, 32, 4)]
        assert peak(traced) == 4 * (32 + 48 + 48)

    def test_memory_of_a_residual_sum(self):
        traced = trace(Net(lambda net, x: (y := net.a(x)) + net.b(y), a=conv(2, 3), b=conv(3, 3)), IMAGES)
        assert peak(traced) == 4 * (32 + 48 + 48 + 48)

    def test_in_place_operators_and_views_take_no_memory(self):
        traced = trace(nn.Sequential(conv(2, 3), nn.ReLU(inplace=True), nn.Flatten()), IMAGES)
        assert [numbers(s.numel) for s in traced.storages] == [32, 48]

    @pytest.mark.parametrize(("norm", "of"), [(nn.InstanceNorm2d(4), 4), (nn.GroupNorm(2, 4), 2)])
    def test_statistics_that_norms_hold_shrink_with_them(self, norm, of):
        storages = trace(nn.Sequential(conv(2, 4), norm, conv(4, 2)), IMAGES).storages
        statistics = [s.numel for s in storages if numbers(s.numel) == of]
        assert [(area.fixed, [labels.size for _, labels in area.maps]) for area in statistics] == [(1, [of])] * 2

    def test_calls_of_modules(self):
        traced = trace(nn.Sequential(nn.Sequential(conv(2, 3)), nn.ReLU()), IMAGES)
        calls = [(call.module, [shape for shape, _ in call.inputs]) for call in traced.calls]
        assert calls == [("0.0", [(1, 2, 4, 4)]), ("1", [(1, 3, 4, 4)])]
        assert traced.names == {"": 0, "0": 1, "0.0": 2, "1": 3}


class Box:
    def __init__(self, inside):
        self.inside = inside
        self.itself = self


class TestRun:
    def test_modes_and_hooks_are_left_as_they_were(self):
        net = nn.Sequential(conv(2, 3), nn.BatchNorm2d(3)).train()
        net[1].eval()
        trace(net, IMAGES)
        assert [m.training for m in net.modules()] == [True, True, False]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        assert net[1].num_batches_tracked == 0

    def test_randomness_of_the_network_is_not_the_callers(self):
        net = between(lambda net, x: F.dropout(x))
        before = torch.get_rng_state()
        trace(net, IMAGES)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_failure_leaves_it_as_it_was_too(self):
        net = between(lambda net, x: 1 / 0).train()
        with pytest.raises(StructureError, match="Net does not run on the example input: ZeroDivisionError: division"):
            trace(net, IMAGES)
        assert all(m.training for m in net.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

    def test_memory_errors_are_passed_on(self):
        def run(net, x):
            raise MemoryError

        with pytest.raises(MemoryError):
            trace(between(run), IMAGES)

    def test_training_mode_is_for_modules_that_hold_others(self):
        net = in_mode(nn.Sequential(nn.Sequential(nn.Dropout()), nn.BatchNorm2d(2)), training=True)
        assert [m.training for m in net.modules()] == [True, True, False, False]
        assert not any(m.training for m in in_mode(net, training=False).modules())

    def test_in_inference_mode_operators_are_taken_apart(self):
        net = between(torch.inference_mode()(lambda net, x: F.relu(x)))
        net.run = torch.inference_mode()(net.run)
        assert found(net) == {"a": {"a.weight 0": [0, 1, 2], "b.weight 1 read": [0, 1, 2]}}

    def test_tensors_are_found_in_anything(self):
        one, two, three = (torch.tensor(float(n)) for n in (1, 2, 3))
        assert [t.item() for t in tensors([{"a": one}, Box((two, Box(three))), "text", None, nn.Linear(1, 1)])] == [
            1,
            2,
            3,
        ]
        assert tensors(torch.distributions.Normal(one, two))[:2] == [one, two]

    def test_outputs_in_objects_are_outputs(self):
        net = Net(lambda net, x: Box((net.b(net.a(x)),)), a=conv(2, 3), b=conv(3, 2))
        assert locked(net) == {"b": OUTPUT}

    def test_a_network_without_output_is_refused(self):
        net = between(lambda net, x: x)
        net.register_forward_hook(lambda module, args, output: "nothing")
        with pytest.raises(StructureError, match="there is no tensor in what the network returns, a str: wrap it"):
            trace(net, IMAGES)
