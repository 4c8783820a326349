"""Laws that hold for every network and every policy, on random small networks.

A network is drawn as a list of stages, each a few lines of `STAGES`; the reference that slicing is compared with shares
no code with the package: weights of readers zeroed by hand, blocks replaced by forward hooks, norms by their formula.
"""

import copy
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from autoprune.cost import CostModel, count
from autoprune.structure import Cut, analyse, cut, plan

KINDS = ("channels", "heads", "blocks")
METRICS = ("macs", "params", "bytes", "activations")
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)


def laws(examples):
    return settings(
        max_examples=examples,
        phases=[Phase.generate],  # networks are small as they are drawn
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# -- random networks --------------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """Some layers, and what to do with them."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


class ChannelsLast(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Separate projections, as Hugging Face writes them; `shared` queries to every key and value."""

    def __init__(self, width, heads, size, shared=1):
        super().__init__()
        self.num_heads, self.head_dim, self.shared = heads, size, shared
        self.query = nn.Linear(width, heads * shared * size)
        self.key = nn.Linear(width, heads * size)
        self.value = nn.Linear(width, heads * size)
        self.output = nn.Linear(heads * shared * size, width)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q = self.query(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        k = self.key(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        v = self.value(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        if self.shared > 1:
            k, v = k.repeat_interleave(self.shared, 1), v.repeat_interleave(self.shared, 1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.output(mixed.transpose(1, 2).reshape(batch, tokens, -1))


def conv(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def norm(kind, width):
    return {
        "none": nn.Identity,
        "batch": lambda: nn.BatchNorm2d(width),
        "group": lambda: nn.GroupNorm(2, width),
        "instance": lambda: nn.InstanceNorm2d(width, affine=True),
    }[kind]()


def plain(c, w, n, act):
    return w, nn.Sequential(conv(c, w), norm(n, w), act())


def pointwise(c, w, n, act):
    return w, nn.Sequential(conv(c, w, 1, bias=False), norm(n, w), act())


def residual(c, w, n, act):
    body = nn.Sequential(conv(c, w), norm(n, w), act(), conv(w, c))
    return c, Stage(lambda self, x: self.act(x + self.body(x)), body=body, act=act())


def pre_activation(c, w, n, act):
    body = nn.Sequential(norm(n, c), act(), conv(c, w), act(), conv(w, c))
    return c, Stage(lambda self, x: x + self.body(x), body=body)


def projected(c, w, n, act):
    body = nn.Sequential(conv(c, w), norm(n, w), act(), conv(w, w))
    return w, Stage(lambda self, x: F.relu(self.body(x) + self.short(x)), body=body, short=conv(c, w, 1))


def dense(c, w, n, act):
    return c + w, Stage(lambda self, x: torch.cat([x, self.layer(x)], 1), layer=nn.Sequential(conv(c, w), act()))


def inception(c, w, n, act):
    branches = nn.ModuleList([conv(c, w, 1), nn.Sequential(conv(c, w, 1), act(), conv(w, 2)), nn.AvgPool2d(3, 1, 1)])
    return w + 2 + c, Stage(lambda self, x: torch.cat([b(x) for b in self.branches], 1), branches=branches)


def inverted(c, w, n, act):
    squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(2 * w, 2, 1), nn.ReLU(), conv(2, 2 * w, 1), nn.Sigmoid())
    return c, Stage(
        lambda self, x: x + self.project(self.squeeze(y := self.depthwise(self.expand(x))) * y),
        expand=nn.Sequential(conv(c, 2 * w, 1), norm(n, 2 * w), act()),
        depthwise=nn.Sequential(conv(2 * w, 2 * w, groups=2 * w), act()),
        squeeze=squeeze,
        project=conv(2 * w, c, 1),
    )


def few_groups(c, w, n, act):
    return 8, nn.Sequential(conv(c, w, 1), act(), conv(w, 8, groups=2), act())


def many_groups(c, w, n, act):
    return 8, nn.Sequential(conv(c, 8, 1), act(), conv(8, 8, groups=4), act())


def multiplier(c, w, n, act):
    return 2 * c, nn.Sequential(conv(c, 2 * c, groups=c), norm(n, 2 * c))


def transposed(c, w, n, act):
    return w, nn.Sequential(nn.ConvTranspose2d(c, w, 2, 2), act(), conv(w, w), nn.MaxPool2d(2))


def gated(c, w, n, act):
    def run(self, x):
        value, gate = self.both(x).chunk(2, 1)
        return value * gate.sigmoid()

    return w, Stage(run, both=conv(c, 2 * w, 1))


def glu(c, w, n, act):
    return w, Stage(lambda self, x: F.glu(self.both(x), 1), both=conv(c, 2 * w, 1))


def pooled(c, w, n, act):
    return c, Stage(lambda self, x: F.interpolate(self.pool(F.pad(x, (1, 1, 1, 1))), (4, 4)), pool=nn.MaxPool2d(2))


def layer_norm(c, w, n, act):
    return w, nn.Sequential(conv(c, w, 1), ChannelsLast(nn.LayerNorm(w)), act())


def scaled(c, w, n, act):
    stage = Stage(lambda self, x: x + self.scale * self.body(x), body=nn.Sequential(conv(c, w), act(), conv(w, c)))
    stage.scale = nn.Parameter(torch.rand(c, 1, 1))
    return c, stage


def widened(c, w, n, act):  # the parameterless shortcut of CIFAR's ResNets
    return c + 4, Stage(lambda self, x: F.pad(x, (0, 0, 0, 0, 2, 2)) + self.body(x), body=conv(c, c + 4))


def tokens_mlp(c, w, n, act):
    return c, ChannelsLast(Stage(lambda self, x: x + self.mlp(self.norm(x)), norm=nn.LayerNorm(c), mlp=nn.Sequential(
        nn.Linear(c, 2 * w), act(), nn.Linear(2 * w, c)
    )))  # fmt: skip


def attention(c, w, n, act, shared=1):
    def run(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(self.norm(tokens))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])

    return c, Stage(run, norm=nn.LayerNorm(c), attention=Attention(c, 3, 2, shared))


class PackedAttention(nn.Module):
    """Queries, keys and values from one layer, as timm writes it."""

    def __init__(self, width, heads, size):
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.output = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.size)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-2, -1) * self.size**-0.5).softmax(-1) @ v
        return self.output(mixed.transpose(1, 2).flatten(2))


def packed(c, w, n, act):
    return c, ChannelsLast(Stage(
        lambda self, x: x + self.attention(self.norm(x).flatten(1, 2)).view(x.shape),
        norm=nn.LayerNorm(c), attention=PackedAttention(c, 3, 2),
    ))  # fmt: skip


def pixels(c, w, n, act):
    net = nn.Sequential(conv(c, 4 * w, 1), nn.PixelShuffle(2), norm(n, w), act(), nn.PixelUnshuffle(2), conv(4 * w, w))
    return w, net


def parts(c, w, n, act):
    def run(self, x):
        one, two = self.both(x).split([w, 4], 1)
        return torch.cat([two, self.one(one)], 1)

    return 4 + w, Stage(run, both=conv(c, w + 4), one=conv(w, w))


def standardised(c, w, n, act):
    def run(self, x):
        weight = self.inner.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.conv2d(x, weight, self.inner.bias, padding=1)

    return w, Stage(run, inner=conv(c, w))


def shuffled(c, w, n, act):
    def run(self, x):
        y = self.inner(x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return self.act(y)

    return 8, Stage(run, inner=conv(c, 8, 1, groups=1), act=act())


def twice(c, w, n, act):
    return c, Stage(lambda self, x: F.relu(self.shared(F.relu(self.shared(x)))), shared=conv(c, c))


STAGES = {
    stage.__name__: stage
    for stage in (
        plain, pointwise, residual, pre_activation, projected, dense, inception, inverted, few_groups, many_groups,
        multiplier, transposed, gated, glu, pooled, layer_norm, scaled, widened, tokens_mlp, attention, packed,
        shuffled, pixels, parts, standardised, twice,
    )
}  # fmt: skip
STAGES["grouped_queries"] = partial(attention, shared=2)


class Flattened(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width * 16, 5)

    def forward(self, x):
        return self.fc(x.flatten(1))


class Pooled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.hidden, self.fc = nn.Linear(width, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(F.gelu(self.hidden(x.mean((2, 3)))))


stages = st.tuples(
    st.sampled_from(sorted(STAGES)),
    st.sampled_from((4, 6, 8)),
    st.sampled_from(("none", "batch", "group", "instance")),
    st.sampled_from((nn.ReLU, nn.Hardswish)),
)
programs = st.tuples(st.lists(stages, min_size=1, max_size=4), st.sampled_from((Flattened, Pooled)))
IMAGES = torch.zeros(1, 3, 4, 4)


def build(program):
    """Return the network of a program, in eval mode, none of its numbers 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    layers, width = [conv(3, 6)], 6
    for name, inner, kind, act in program[0]:
        width, stage = STAGES[name](width, inner, kind, act)
        layers.append(stage)
    net = nn.Sequential(*layers, program[1](width)).eval()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator) / max(1, tensor[0].numel()) ** 0.5
                tensor.copy_(drawn.abs() + 0.5 if name.endswith(("running_var", "scale")) else drawn)
    return net


def counts_of(structure, data, name="sparsities"):
    sparsities = st.lists(st.floats(0, 1), min_size=len(structure), max_size=len(structure))
    drawn = data.draw(sparsities, label=name)
    return {group.name: group.nearest(share * group.size) for group, share in zip(structure, drawn, strict=True)}


def chosen(structure, counts, seed=0):
    """Return random elements, so many of every group."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.size, generator=generator)[: counts[group.name]].sort().values.tolist()
        for group in structure
    }


# -- the reference ----------------------------------------------------------------------------------------------------


def over_kept(layer, gone):
    """Make a norm's forward that of a norm over the channels that are not gone, and 0 elsewhere."""
    keep = torch.tensor([i for i in range(layer.weight.numel()) if i not in gone])
    dim = 1 if isinstance(layer, nn.GroupNorm) else -1

    def forward(x):
        kept = x.index_select(dim, keep)
        dims = tuple(range(1, x.dim())) if dim == 1 else (-1,)
        centred = kept - kept.mean(dims, keepdim=True)
        scaled = centred / (centred.square().mean(dims, keepdim=True) + layer.eps).sqrt()
        weight, bias = layer.weight[keep], layer.bias[keep]
        shape = [-1] + [1] * (x.dim() - 2) if dim == 1 else [-1]
        result = torch.zeros_like(x)
        return result.index_copy(dim, keep, scaled * weight.view(shape) + bias.view(shape))

    layer.forward = forward


@torch.no_grad()
def masked(net, structure, removed, images):
    """Return what the dense network computes with the elements zeroed where they are read."""
    dense = copy.deepcopy(net).double()
    tensors = dict(dense.named_parameters())
    normalised = {}
    for group in structure:
        rows = removed[group.name]
        if not rows:
            continue
        if group.block is not None:
            dense.get_submodule(group.block).register_forward_hook(lambda module, args, output: args[0])
        for part in group.slices:
            gone = part.positions[rows].flatten()
            if part.role == "read":
                tensors[part.tensor].index_fill_(part.dim, gone, 0.0)
            layer = dense.get_submodule(part.tensor.rpartition(".")[0])
            one = isinstance(layer, nn.GroupNorm) and layer.num_groups == 1
            if group.normalised and part.tensor.endswith("weight") and (one or isinstance(layer, nn.LayerNorm)):
                normalised.setdefault(layer, set()).update(gone.tolist())
    for layer, gone in normalised.items():
        over_kept(layer, gone)
    return dense(images.double())


def agree(one, other):
    return one.shape == other.shape and (one - other).abs().max() <= 1e-9 * other.abs().max().clamp_min(1e-12)


# -- the laws ---------------------------------------------------------------------------------------------------------


@laws(100)
@given(programs, st.data())
def test_slicing_equals_masking(program, data):
    net = build(program)
    structure = analyse(net, IMAGES, kinds=KINDS)
    removed = chosen(structure, counts_of(structure, data))
    smaller = cut(net, plan(net, structure, removed))
    images = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert agree(smaller.double()(images.double()), masked(net, structure, removed, images))


@laws(25)
@given(programs, st.data())
def test_slicing_across_a_norm_equals_a_norm_over_what_stays(program, data):
    between = [stage for stage in program[0][:2] if stage[0] != "standardised"]  # whose weights are normalised as well
    net = build(([("layer_norm", 6, "none", nn.ReLU), *between, ("tokens_mlp", 4, "none", nn.GELU)], program[1]))
    structure = analyse(net, IMAGES, kinds=KINDS, normalised=True)
    removed = chosen(structure, counts_of(structure, data))
    smaller = cut(net, plan(net, structure, removed))
    images = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert agree(smaller.double()(images.double()), masked(net, structure, removed, images))


@laws(100)
@given(programs, st.data())
def test_the_cost_by_formula_is_the_cost_by_count(program, data):
    net = build(program)
    structure = analyse(net, IMAGES, kinds=KINDS)
    costs = CostModel(net, IMAGES, structure)
    counts = counts_of(structure, data)
    smaller = cut(net, plan(net, structure, chosen(structure, counts)))
    assert costs.dense == count(net, IMAGES).cost
    assert costs.cost(counts) == count(smaller, IMAGES).cost


@laws(25)
@given(programs, st.data())
def test_removing_more_never_costs_more(program, data):
    net = build(program)
    structure = analyse(net, IMAGES, kinds=KINDS)
    costs = CostModel(net, IMAGES, structure)
    fewer = counts_of(structure, data, "fewer")
    other = counts_of(structure, data, "other")
    more = {name: max(fewer[name], other[name]) for name in fewer}
    before, after = costs.cost(fewer), costs.cost(more)
    assert all(getattr(after, metric) <= getattr(before, metric) for metric in METRICS)


@laws(20)
@given(programs, st.sampled_from((2, 4)), st.data())
def test_what_stays_is_a_multiple(program, multiple, data):
    net = build(program)
    structure = analyse(net, IMAGES, kinds=("channels",), multiple=multiple)
    removed = chosen(structure, counts_of(structure, data))
    smaller = dict(cut(net, plan(net, structure, removed)).named_parameters())
    assert all(0 <= len(rows) < structure[name].size for name, rows in removed.items())
    for group in structure:
        written = group.slices[0]
        left = (group.size - len(removed[group.name])) * written.positions.shape[1]
        assert left % multiple == 0 or not removed[group.name]
        assert 0 < left <= smaller[written.tensor].shape[written.dim]


@laws(15)
@given(programs, st.booleans())
def test_the_analysis_leaves_the_network_as_it_was(program, training):
    net = build(program).train(training)
    hook = net[0].register_forward_hook(lambda module, args, output: None)
    next(net.parameters()).requires_grad_(False)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in net.state_dict(keep_vars=True).items()}
    attributes = [{k: v for k, v in vars(m).items() if isinstance(v, int | str | type)} for m in net.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    rng = torch.get_rng_state()
    analyse(net, IMAGES, kinds=KINDS)
    after = net.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(id(after[n]) == old and torch.equal(after[n], value) for n, (old, value) in before.items())
    assert [{k: v for k, v in vars(m).items() if isinstance(v, int | str | type)} for m in net.modules()] == attributes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == hooks
    assert [m.training for m in net.modules()] == [training] * len(hooks)
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * (len(list(net.parameters())) - 1)
    assert torch.equal(torch.get_rng_state(), rng)
    hook.remove()


@laws(25)
@given(programs)
def test_every_layer_is_offered_or_locked_with_a_reason(program):
    net = build(program)
    structure = analyse(net, IMAGES, kinds=KINDS)
    names = [*structure.names, *(locked.name for locked in structure.locked)]
    assert len(set(names)) == len(names)
    assert all(locked.reason and locked.size > 0 and "\n" not in locked.reason for locked in structure.locked)
    mentioned = {layer for group in (*structure, *structure.locked) for layer in group.layers}
    assert {name for name, module in net.named_modules() if isinstance(module, LAYERS)} <= mentioned
    for group in structure:
        rows = [part.positions for part in group.slices]
        assert all(len(row) == group.size and len(row.unique()) == row.numel() for row in rows)


@laws(15)
@given(programs, st.data())
def test_a_cut_written_and_read_builds_the_same_network(program, data):
    net = build(program)
    structure = analyse(net, IMAGES, kinds=KINDS)
    change = plan(net, structure, chosen(structure, counts_of(structure, data)))
    one, other = cut(net, change), cut(net, Cut.from_dict(change.to_dict()))
    assert Cut.from_dict(change.to_dict()).to_dict() == change.to_dict()
    assert str(one) == str(other)
    assert [name for name, _ in one.named_parameters()] == [name for name, _ in other.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    images = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(one(images), other(images))


@pytest.mark.parametrize("name", sorted(STAGES))
def test_every_stage_offers_something(name):
    net = build(([(name, 6, "batch", nn.ReLU), ("plain", 4, "none", nn.ReLU)], Pooled))
    assert any("2." in layer or layer == "2" for group in analyse(net, IMAGES) for layer in group.layers)
