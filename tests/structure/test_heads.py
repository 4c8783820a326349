import copy
import importlib
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from autoprune.errors import StructureError
from autoprune.structure import loose_attention
from autoprune.structure.groups import Attribute
from autoprune.structure.heads import FewerHeadsAttention, adaptations, refit
from autoprune.structure.loose_attention import LooseAttention, reads_width_off_input

EXACT = {"rtol": 0.0, "atol": 1e-10}
HEADS, REMOVED = 4, (0, 2)
PACKED = {"in_proj_weight": (0, 3), "in_proj_bias": (0, 3), "out_proj.weight": (1, 1)}
SEPARATE = {
    "q_proj_weight": (0, 1),
    "k_proj_weight": (0, 1),
    "v_proj_weight": (0, 1),
    "in_proj_bias": (0, 3),
    "out_proj.weight": (1, 1),
}
SWIN = {
    "qkv.weight": (0, 3),
    "qkv.bias": (0, 3),
    "proj.weight": (1, 1),
    "relative_position_bias_table": (1, 1),
}
SWIN_V2 = {
    "qkv.weight": (0, 3),
    "qkv.bias": (0, 3),
    "proj.weight": (1, 1),
    "logit_scale": (0, 1),
    "cpb_mlp.2.weight": (0, 1),
}
MAXVIT = {
    "to_qkv.weight": (0, 3),
    "to_qkv.bias": (0, 3),
    "merge.weight": (1, 1),
    "relative_position_bias_table": (1, 1),
}
HF = {f"{name}.{tensor}": (0, 1) for name in ("query", "key", "value") for tensor in ("weight", "bias")}
HF["dense.weight"] = (1, 1)
GROUPED = {f"{name}_proj.weight": (0, 1) for name in "qkv"} | {"o_proj.weight": (1, 1)}

Layout = Mapping[str, tuple[int, int]]
"""Tensor → the dimension that heads lie along, and how many stretches of all heads follow each other there."""


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def elements(length: int, packs: int, heads: list[int]) -> torch.Tensor:
    return torch.arange(length).view(packs, HEADS, -1)[:, heads].flatten()


def without(
    module: nn.Module, layout: Layout, attributes: tuple[Attribute, ...], removed: tuple[int, ...] = REMOVED
) -> nn.Module:
    smaller = copy.deepcopy(module)
    kept = [head for head in range(HEADS) if head not in removed]
    for name, tensor in (*smaller.named_parameters(), *smaller.named_buffers()):
        if name in layout:
            dim, packs = layout[name]
            tensor.data = tensor.data.index_select(dim, elements(tensor.shape[dim], packs, kept))
    for attribute in attributes:
        part = smaller.get_submodule(attribute.module)
        setattr(part, attribute.name, getattr(part, attribute.name) - len(removed) * attribute.each)
    for name in dict.fromkeys(attribute.module for attribute in attributes):
        refit(smaller.get_submodule(name))
    return smaller


def silenced(module: nn.Module, layout: Layout, removed: tuple[int, ...] = REMOVED) -> nn.Module:
    masked = copy.deepcopy(module)
    (name,) = (name for name, (dim, _) in layout.items() if dim == 1 and name.endswith(".weight"))
    weight = masked.get_parameter(name)
    weight.data[:, elements(weight.shape[1], 1, list(removed))] = 0
    return masked


def only(module: nn.Module) -> tuple[Attribute, ...]:
    (candidate,) = adaptations(module, "", HEADS)
    return candidate


class HuggingFaceStyle(nn.Module):
    """Separate projections, names as in BERT's code, a configuration that the whole network shares."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=HEADS, hidden_size=width)
        self.num_attention_heads = HEADS
        self.attention_head_size = width // HEADS
        self.all_head_size = width
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(0.0)
        self.dense = nn.Linear(width, width)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.num_attention_heads, self.attention_head_size).permute(0, 2, 1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        weights = self.dropout(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * self.attention_head_size**-0.5, -1))
        mixed = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous()
        return self.dense(mixed.view(*mixed.shape[:-2], self.all_head_size))


class GroupedQueries(nn.Module):
    """Two queries to every key-value head; as many repeats as the shared heads of a small model could be."""

    def __init__(self, width: int = 24, repeats: int = 2) -> None:
        super().__init__()
        self.layer_idx = HEADS
        self.num_heads, self.num_key_value_heads, self.num_key_value_groups = HEADS * repeats, HEADS, repeats
        self.head_dim = 3
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, HEADS * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, HEADS * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        k, v = (part.repeat_interleave(self.num_key_value_groups, dim=1) for part in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class ByTensors(nn.Module):
    """Takes its number of heads from its tensors; `depth` equals it by chance."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.head_dim, self.depth = width // HEADS, HEADS
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)) * self.depth


class Textbook(nn.Module):
    """As in most code for vision transformers: the width of all heads is that of the input."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.num_heads, self.scale = HEADS, (width // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = self.dropout((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
        return self.proj((weights @ v).transpose(1, 2).reshape((B, N, C)))


def attention(**options: object) -> nn.Module:
    return randomised(nn.MultiheadAttention(12, HEADS, **options))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def moved(heads: type[nn.Module], size: tuple[int, int], shift: tuple[int, int], **options: bool) -> nn.Module:
    return randomised(heads(12, [*size], [*shift], HEADS, **options))


SINGLE: dict[str, tuple[Callable[[], nn.Module], Layout, tuple[int, ...]]] = {
    "hf": (lambda: randomised(HuggingFaceStyle()), HF, (2, 5, 12)),
    "textbook": (lambda: randomised(Textbook()), SWIN, (2, 5, 12)),
    "swin": (lambda: moved(ShiftedWindowAttention, (4, 4), (0, 0)), SWIN, (2, 8, 8, 12)),
    "swin shifted": (lambda: moved(ShiftedWindowAttention, (4, 4), (2, 2)), SWIN, (2, 8, 8, 12)),
    "swin padded": (lambda: moved(ShiftedWindowAttention, (4, 3), (2, 1)), SWIN, (2, 7, 10, 12)),
    "swin one axis": (lambda: moved(ShiftedWindowAttention, (4, 3), (2, 1)), SWIN, (2, 3, 10, 12)),
    "swin one window": (lambda: moved(ShiftedWindowAttention, (4, 4), (2, 2)), SWIN, (1, 3, 4, 12)),
    "swin no bias": (
        lambda: moved(ShiftedWindowAttention, (4, 4), (2, 2), qkv_bias=False, proj_bias=False),
        SWIN,
        (1, 8, 8, 12),
    ),
    "swin v2": (lambda: moved(ShiftedWindowAttentionV2, (4, 4), (2, 2)), SWIN_V2, (2, 8, 9, 12)),
    "swin v2 no bias": (
        lambda: moved(ShiftedWindowAttentionV2, (4, 4), (0, 2), qkv_bias=False),
        SWIN_V2,
        (1, 8, 8, 12),
    ),
    "maxvit": (lambda: randomised(RelativePositionalMultiHeadAttention(12, 3, 16)), MAXVIT, (2, 5, 16, 12)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("build", "layout", "shape"), SINGLE.values(), ids=SINGLE)
def test_slicing_equals_silencing(
    build: Callable[[], nn.Module], layout: Layout, shape: tuple[int, ...], training: bool
) -> None:
    dense, x = build().train(training), tokens(*shape)
    before = dense(x)
    smaller = without(dense, layout, adaptations(dense, "", HEADS)[0])
    torch.testing.assert_close(smaller(x), silenced(dense, layout)(x), **EXACT)
    other = silenced(dense, layout, (0, 1))
    assert (smaller(x) - other(x)).abs().max() > 1e-3
    assert isinstance(smaller, type(dense))
    assert list(smaller.state_dict()) == list(dense.state_dict())
    assert torch.equal(dense(x), before)


@pytest.mark.parametrize(("build", "layout", "shape"), SINGLE.values(), ids=SINGLE)
def test_a_smaller_module_is_copied_pickled_and_exported(
    build: Callable[[], nn.Module], layout: Layout, shape: tuple[int, ...]
) -> None:
    dense, x = build(), tokens(*shape)
    smaller = without(dense, layout, adaptations(dense, "", HEADS)[0])
    expected = smaller(x)
    assert torch.equal(copy.deepcopy(smaller)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(smaller))(x), expected)
    torch.testing.assert_close(torch.export.export(smaller, (x,)).module()(x), expected, **EXACT)


@pytest.mark.parametrize(("build", "layout", "shape"), SINGLE.values(), ids=SINGLE)
def test_a_smaller_module_shrinks_again(
    build: Callable[[], nn.Module], layout: Layout, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, x = build(), tokens(*shape)
    once = without(dense, layout, adaptations(dense, "", HEADS)[0], (0, 3))
    monkeypatch.setattr(sys.modules[__name__], "HEADS", 2)
    twice = without(once, layout, adaptations(once, "", 2)[0], (1,))
    torch.testing.assert_close(twice(x), silenced(once, layout, (1,))(x), **EXACT)


@pytest.mark.parametrize(("build", "layout", "shape"), SINGLE.values(), ids=SINGLE)
def test_the_forward_is_exact_with_all_heads_as_well(
    build: Callable[[], nn.Module], layout: Layout, shape: tuple[int, ...]
) -> None:
    dense, x = build(), tokens(*shape)
    smaller = without(dense, layout, adaptations(dense, "", HEADS)[0])
    if type(smaller) is not type(dense):
        same = copy.deepcopy(dense)
        same.__class__ = type(smaller)
        torch.testing.assert_close(same(x), dense(x), **EXACT)


@pytest.mark.parametrize("name", [name for name in SINGLE if name != "textbook"])
def test_a_module_with_all_heads_is_left_alone(name: str) -> None:
    for dense in (SINGLE[name][0](), attention()):
        kind, state = type(dense), dict(vars(dense))
        refit(dense)
        assert type(dense) is kind
        assert vars(dense) == state


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}],
    ids=str,
)
@pytest.mark.parametrize("masks", ["", "padding", "attention", "causal", "heads", "floats", "padding causal"])
def test_multihead_attention(
    options: dict[str, bool], batch_first: bool, training: bool, need_weights: bool, masks: str
) -> None:
    dense = attention(batch_first=batch_first, **options).train(training)
    layout = {**PACKED, "bias_k": (2, 1), "bias_v": (2, 1)}
    smaller = without(dense, layout, only(dense))
    x = tokens(2, 5, 12) if batch_first else tokens(5, 2, 12)
    call: dict[str, object] = {"need_weights": need_weights, "average_attn_weights": False}
    if "padding" in masks:
        call["key_padding_mask"] = torch.arange(5) >= torch.tensor([[3], [4]])
    if "attention" in masks:
        call["attn_mask"] = torch.rand(5, 5) > 0.7
        call["attn_mask"].fill_diagonal_(False)
    if "floats" in masks:
        call["attn_mask"] = tokens(5, 5)
        call["key_padding_mask"] = tokens(2, 5)
    if "causal" in masks:
        call["attn_mask"] = torch.ones(5, 5).triu(1).bool()
        call["is_causal"] = True
    if masks == "heads":
        mask = tokens(2, HEADS, 5, 5)
        expected = silenced(dense, layout)(x, x, x, **call, attn_mask=mask.flatten(0, 1))
        found = smaller(x, x, x, **call, attn_mask=mask[:, [1, 3]].flatten(0, 1))
    else:
        expected = silenced(dense, layout)(x, x, x, **call)
        found = smaller(x, x, x, **call)
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    if need_weights:
        torch.testing.assert_close(found[1], expected[1][:, [1, 3]], **EXACT)
    else:
        assert found[1] is None
    assert found[0].is_contiguous()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [{}, {"kdim": 7}, {"kdim": 7, "vdim": 9}], ids=str)
def test_attention_to_another_sequence(widths: dict[str, int], bias: bool, need_weights: bool) -> None:
    dense = attention(bias=bias, **widths)
    layout = SEPARATE if widths else PACKED
    smaller = without(dense, layout, only(dense))
    key = tokens(6, 2, widths.get("kdim", 12))
    value = tokens(6, 2, widths.get("vdim", 12))
    inputs = tokens(5, 2, 12), key, value
    torch.testing.assert_close(
        smaller(*inputs, need_weights=need_weights)[0], silenced(dense, layout)(*inputs)[0], **EXACT
    )


def test_attention_without_a_batch() -> None:
    dense = attention(batch_first=True)
    smaller, x = without(dense, PACKED, only(dense)), tokens(5, 12)
    padding = torch.arange(5) > 3
    found = smaller(x, x, x, key_padding_mask=padding, attn_mask=torch.eye(5) == 2)
    expected = silenced(dense, PACKED)(x, x, x, key_padding_mask=padding, attn_mask=torch.eye(5) == 2)
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    assert found[1].shape == (5, 5)
    assert smaller(x, x, x, need_weights=False)[1] is None


def test_average_weights_are_of_the_heads_that_are_left() -> None:
    dense, x = attention(batch_first=True), tokens(2, 5, 12)
    average = without(dense, PACKED, only(dense))(x, x, x)[1]
    torch.testing.assert_close(average, dense(x, x, x, average_attn_weights=False)[1][:, [1, 3]].mean(1), **EXACT)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_falls_on_weights_in_training_only(need_weights: bool) -> None:
    dense, x = attention(dropout=0.5, batch_first=True), tokens(2, 5, 12)
    smaller = without(dense, PACKED, only(dense))
    torch.testing.assert_close(
        smaller(x, x, x, need_weights=need_weights)[0], silenced(dense, PACKED)(x, x, x)[0], **EXACT
    )
    smaller.train()
    first, second = (smaller(x, x, x, need_weights=need_weights)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_multihead_attention_refuses_with_a_reason() -> None:
    dense, x = attention(batch_first=True), tokens(2, 5, 12)
    smaller = without(dense, PACKED, only(dense))
    with pytest.raises(StructureError, match=r"must have batch · heads = 4 maps .* but has 8"):
        smaller(x, x, x, attn_mask=tokens(2 * HEADS, 5, 5))
    with pytest.raises(StructureError, match="give the mask"):
        smaller(x, x, x, is_causal=True)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning")
def test_nested_tensors_attend_to_themselves_only() -> None:
    dense = attention(batch_first=True)
    smaller = without(dense, PACKED, only(dense))
    nested = torch.nested.as_nested_tensor([tokens(3, 12), tokens(5, 12)])
    with pytest.raises(StructureError, match="pad them"):
        smaller(nested, nested, torch.nested.as_nested_tensor([tokens(3, 12), tokens(5, 12)]))


def test_a_smaller_multihead_attention_is_copied_pickled_and_exported() -> None:
    dense, x = attention(batch_first=True), tokens(2, 5, 12)
    smaller = without(dense, PACKED, only(dense))
    assert isinstance(smaller, FewerHeadsAttention)
    assert list(smaller.state_dict()) == list(dense.state_dict())
    expected, _ = smaller(x, x, x)
    buffer = io.BytesIO()
    torch.save(smaller, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(smaller), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x, x, x)[0], expected)
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {name: {1: length} for name in ("query", "key", "value")}
    exported = torch.export.export(smaller, (x, x, x), dynamic_shapes=shapes).module()
    torch.testing.assert_close(exported(x, x, x)[0], expected, **EXACT)
    longer = tokens(2, 9, 12)
    torch.testing.assert_close(exported(longer, longer, longer)[0], smaller(longer, longer, longer)[0], **EXACT)


def transformer(norm_first: bool = False) -> tuple[nn.TransformerEncoder, nn.TransformerEncoder, nn.TransformerEncoder]:
    """Return a dense transformer, itself with heads of its first layer silenced, and with these removed."""
    layer = nn.TransformerEncoderLayer(12, HEADS, 20, dropout=0.0, batch_first=True, norm_first=norm_first)
    dense = randomised(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first))
    prefix = "layers.0.self_attn"
    layout = {f"{prefix}.{name}": place for name, place in PACKED.items()}
    (attributes,) = adaptations(dense, f"{prefix}.out_proj", HEADS)
    assert attributes == (Attribute(prefix, "num_heads", 1),)
    return dense, silenced(dense, layout), without(dense, layout, attributes)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_of_torch_in_every_mode(norm_first: bool) -> None:
    _, masked, smaller = transformer(norm_first)
    x = tokens(2, 5, 12)
    expected = masked.train()(x)
    torch.testing.assert_close(smaller.train()(x), expected, **EXACT)
    torch.testing.assert_close(smaller.eval()(x), expected, **EXACT)
    with torch.no_grad():  # where a dense layer takes its fused kernel
        torch.testing.assert_close(smaller(x), expected, **EXACT)
        causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
        torch.testing.assert_close(
            smaller(x, mask=causal, is_causal=True), masked(x, mask=causal, is_causal=True), **EXACT
        )


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning")
def test_a_transformer_of_torch_with_padding_that_it_nests() -> None:
    _, masked, smaller = transformer()
    x, padding = tokens(2, 5, 12), torch.arange(5) >= torch.tensor([[3], [5]])
    with torch.no_grad():
        expected = masked.eval()(x, src_key_padding_mask=padding)
        assert (expected[0, 3:] == 0).all()  # it did nest them
        torch.testing.assert_close(smaller.eval()(x, src_key_padding_mask=padding), expected, **EXACT)


def test_known_classes_have_one_adaptation_from_wherever_heads_were_mixed() -> None:
    model = nn.ModuleDict({"block": nn.Sequential(moved(ShiftedWindowAttention, (4, 4), (2, 2)))})
    expected = [(Attribute("block.0", "num_heads", 1),)]
    assert adaptations(model, "block.0", HEADS) == expected
    assert adaptations(model, "block.0.proj", HEADS) == expected


def test_numbers_of_a_strangers_module() -> None:
    first, *others = adaptations(nn.Sequential(HuggingFaceStyle()), "0", HEADS)
    assert first == (Attribute("0", "all_head_size", 3), Attribute("0", "num_attention_heads", 1))
    assert others == [(Attribute("0", "num_attention_heads", 1),), ()]


def shrinks_exactly(
    module: nn.Module, layout: Layout, candidate: tuple[Attribute, ...], x: torch.Tensor | None = None
) -> bool:
    x = tokens(2, 5, module.get_parameter(next(iter(layout))).shape[1]) if x is None else x
    try:
        found = without(module, layout, candidate)(x)
    except RuntimeError:
        return False
    return torch.allclose(found, silenced(module, layout)(x), **EXACT)


@pytest.mark.parametrize("repeats", [2, HEADS])
def test_grouped_queries_go_with_their_key_value_head(repeats: int) -> None:
    module = randomised(GroupedQueries(repeats=repeats))
    first = adaptations(module, "", HEADS)[0]
    assert first == (Attribute("", "num_heads", repeats), Attribute("", "num_key_value_heads", 1))
    assert shrinks_exactly(module, GROUPED, first)


def test_the_number_of_queries_to_a_key_value_head_stays() -> None:
    model = Holder(nn.Identity(), num_heads=16, num_kv_heads=HEADS, heads_per_group=HEADS)
    assert adaptations(model, "", HEADS)[0] == (Attribute("", "num_heads", 4), Attribute("", "num_kv_heads", 1))


def test_queries_that_share_one_key_value_head() -> None:
    module = randomised(GroupedQueries(repeats=1))
    module.num_key_value_heads, module.num_key_value_groups = 1, HEADS
    module.k_proj, module.v_proj = (nn.Linear(24, 3, bias=False).double() for _ in range(2))
    layout = {name: GROUPED[name] for name in ("q_proj.weight", "o_proj.weight")}
    exact = [candidate for candidate in adaptations(module, "", HEADS) if shrinks_exactly(module, layout, candidate)]
    assert exact == [(Attribute("", "num_heads", 1), Attribute("", "num_key_value_groups", 1))]


def test_a_number_that_equals_the_heads_by_chance_stays() -> None:
    module = randomised(ByTensors())
    layout = {name: SWIN[name] for name in ("qkv.weight", "qkv.bias", "proj.weight")}
    candidates = adaptations(module, "", HEADS)
    assert candidates == [(), (Attribute("", "depth", 1),)]
    assert [shrinks_exactly(module, layout, candidate) for candidate in candidates] == [True, False]


class Holder(nn.Module):
    """An attention whose heads are counted by it, by what it calls, or by both."""

    def __init__(self, core: nn.Module, **numbers: int) -> None:
        super().__init__()
        self.core = core
        self.width = nn.Linear(12, 12)
        for name, number in numbers.items():
            setattr(self, name, number)


def test_numbers_of_the_parent_and_of_parts() -> None:
    owner = Attribute("core", "num_heads", 1)
    parent = Attribute("", "num_heads", 1)
    without_own = Holder(Holder(nn.Identity()), num_heads=HEADS)
    assert adaptations(without_own, "core", HEADS) == [(parent,), ()]
    assert adaptations(without_own, "core.width", HEADS) == [(parent,), ()]
    both = Holder(Holder(nn.Identity(), num_heads=HEADS), num_heads=HEADS)
    assert adaptations(both, "core", HEADS) == [(owner,), (owner, parent), ()]
    assert adaptations(both, "", HEADS) == [(parent,), (parent, owner), ()]


def test_only_code_that_computes_its_last_size_is_run_loosely() -> None:
    class Inferred(nn.Module):
        def forward(self, x: torch.Tensor, width: int) -> torch.Tensor:
            return x.reshape(-1, width)

    kinds = (Textbook, HuggingFaceStyle, Inferred, nn.Linear)
    assert [reads_width_off_input(kind) for kind in kinds] == [True, False, False, False]
    unreadable: dict[str, type[nn.Module]] = {}
    exec("class Unreadable(nn.Module):\n    def forward(self, x):\n        return x", {"nn": nn}, unreadable)
    assert reads_width_off_input(unreadable["Unreadable"])


def test_loose_code_keeps_other_reshapes_and_their_faults() -> None:
    class Reshapes(nn.Module):
        def forward(self, x: torch.Tensor, *sizes: int) -> torch.Tensor:
            rows, columns = x.shape
            return x.view(torch.int64).view(torch.float64).reshape(columns, rows).view(sizes)

    module = Reshapes()
    loose_attention.refit(module)
    kind = type(module)
    assert issubclass(kind, LooseAttention)
    loose_attention.refit(module)
    assert type(module) is kind
    x = tokens(4, 6)
    assert torch.equal(module(x, -1, 8), x.view(3, 8))
    assert torch.equal(module(x, 24), x.flatten())
    for sizes in ((7, 2), (23,)):
        with pytest.raises(RuntimeError, match="invalid for input of size 24"):
            module(x, *sizes)


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("timm.layers.attention.Attention", {"qkv_bias": True}),
        ("timm.layers.attention.AttentionRope", {}),
        ("timm.models.swin_transformer.WindowAttention", {"window_size": 4}),
        ("timm.models.swin_transformer_v2.WindowAttention", {"window_size": (4, 4)}),
        ("timm.models.beit.Attention", {"qkv_bias": True}),
        ("timm.models.cait.TalkingHeadAttn", {}),
    ],
    ids=str,
)
def test_attention_of_timm(path: str, options: dict[str, object]) -> None:
    pytest.importorskip("timm")
    place, _, name = path.rpartition(".")
    buffers = {"k_bias": (0, 1), "q_bias": (0, 1), "v_bias": (0, 1)}
    module = randomised(getattr(importlib.import_module(place), name)(dim=12, num_heads=HEADS, **options))
    layout = {**SWIN, **SWIN_V2, **buffers}
    exact = [
        shrinks_exactly(module, layout, candidate, tokens(2, 16, 12)) for candidate in adaptations(module, "", HEADS)
    ]
    assert exact[0] is (name != "TalkingHeadAttn")  # whose heads are mixed with each other
    assert not exact[-1]


def test_candidates_are_few_and_without_repeats() -> None:
    numbers = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 12, "attn_dim": 12, "embed_dim": 12, "n_rep": 4}
    model = Holder(Holder(nn.Identity(), **numbers), **numbers)
    candidates = adaptations(model, "core", HEADS)
    assert len(candidates) == len(set(candidates)) == 6
    assert candidates == adaptations(copy.deepcopy(model), "core", HEADS)
    assert not any(attribute.name == "head_dim" for candidate in candidates for attribute in candidate)


def test_torchvision_is_loaded_only_when_a_module_of_its_is_met() -> None:
    code = (
        "import sys; from torch import nn; from autoprune.structure.heads import refit; refit(nn.Linear(2, 2)); "
        "refit(nn.MultiheadAttention(4, 2)); sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
