"""How a module's code is made to run with fewer attention heads: the numbers it reads, and forwards of our own.

Which tensors the heads lie in is found elsewhere, and so is the proof: what is guessed here of a stranger's module is
tried and compared with the dense network before it is offered. Classes of torchvision are in their own file, which is
loaded when one is met.
"""

import re
from collections.abc import Iterable
from itertools import chain

import torch
from torch import nn
from torch.nn import functional

from autoprune.errors import StructureError
from autoprune.structure import loose_attention
from autoprune.structure.groups import Attribute

__all__ = ["FewerHeadsAttention", "adaptations", "refit"]

_KNOWN = {
    "torch.nn.modules.activation.MultiheadAttention": "num_heads",
    "autoprune.structure.heads.FewerHeadsAttention": "num_heads",
    "torchvision.models.swin_transformer.ShiftedWindowAttention": "num_heads",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": "num_heads",
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": "n_heads",
    "autoprune.structure.torchvision_attention.FewerHeadsWindowAttention": "num_heads",
    "autoprune.structure.torchvision_attention.FewerHeadsWindowAttentionV2": "num_heads",
    "autoprune.structure.torchvision_attention.FewerHeadsRelativeAttention": "n_heads",
}
"""Class → the attribute that holds its number of heads; `refit` makes the rest follow."""

_CANDIDATES = 6
_HEADS = re.compile(r"head|^h$")
_REPEATS = re.compile(r"group|rep")  # queries to a key-value head
_SIZE = re.compile(r"dim|size|width|features|channels|embd|model")
_OF_ONE = re.compile(r"^(?!all|total).*head")  # with a size: the size of one head
_MODEL = re.compile(r"emb|hidden|model|^dim|dim_?(in|out)$|^(in|out|input|output)_|channels$|features$")


def adaptations(model: nn.Module, owner: str, heads: int) -> list[tuple[Attribute, ...]]:
    """Return the sets of attributes that may have to shrink when heads are removed, the most likely first.

    A known class has exactly one. A stranger's module is guessed at from the integers it holds: its numbers of heads
    go by their value, widths and numbers of grouped queries by their name too. Objects that modules share, such as a
    configuration, are left alone.

    Args:
        model: The dense network.
        owner: The name of the module whose code mixed the heads.
        heads: How many elements the group has. Where keys and values are shared by several queries (Ainslie et al.
            2023, arXiv:2305.13245) an element is a key-value head with all of its queries.

    Returns:
        At most six sets. The empty one is for code that takes its number of heads from the tensors; it stands before
        sets in which no name speaks of heads.
    """
    name = _outside_torch(model, owner)
    known = _KNOWN.get(_path(type(model.get_submodule(name))))
    if known is not None:
        return [(Attribute(name, known, 1),)]
    own = _guesses(model, name, heads)
    parent = _outside_torch(model, name.rpartition(".")[0])
    above = _guesses(model, parent, heads) if parent != name else []
    below = [_guesses(model, part, heads)[:1] for part in _below(model, name)]
    if own:
        joined = [(*own[0], *chain(*guesses)) for guesses in (chain(*below), above[:1])]
        own = [*own, *(guess for guess in joined if guess != own[0])]
    ordered = [*(own or above)[: _CANDIDATES - 1], ()]
    return sorted(ordered, key=_speaks_of_heads, reverse=True)


def refit(module: nn.Module) -> None:
    """Make a module run with fewer heads than its class provides for; what needs nothing is left alone.

    The module, whose tensors and attributes have shrunk already, gets a subclass of its own class with another forward.
    """
    if type(module) is nn.MultiheadAttention:
        if module.num_heads * module.head_dim != module.embed_dim:
            module.__class__ = FewerHeadsAttention
            module._qkv_same_embed_dim = False  # keeps `nn.TransformerEncoderLayer` from its own fused kernel
    elif _path(type(module)) not in _KNOWN:
        loose_attention.refit(module)
    elif type(module).__module__.startswith("torchvision."):
        from autoprune.structure import torchvision_attention

        torchvision_attention.refit(module)


class FewerHeadsAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose inner width, `num_heads · head_dim`, is less than its `embed_dim`.

    Its forward takes and returns what its base's does, with these differences: an attention mask of three dimensions
    has to have as many maps as heads are left, and average weights are the average over the heads that are left.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; see the base class for shapes and arguments.

        Raises:
            StructureError: A mask for every head, made for another number of heads; nested tensors that are not used
                for self-attention without a mask; `is_causal` without a mask.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            if query is not key or key is not value or key_padding_mask is not None or attn_mask is not None:
                raise StructureError("with fewer heads nested tensors must attend to themselves, unmasked; pad them")
            return self._nested(query, need_weights, average_attn_weights)
        if is_causal and attn_mask is None:
            raise StructureError("is_causal says of a mask that it is causal, but attn_mask is None; give the mask")
        batched = query.dim() == 3
        q, k, v = (self._split(part, batched) for part in self._project(query, key, value))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self._split(self.bias_k.squeeze(0), False).expand(len(k), -1, -1, -1)], dim=2)
            v = torch.cat([v, self._split(self.bias_v.squeeze(0), False).expand(len(v), -1, -1, -1)], dim=2)
        if self.add_zero_attn:
            k, v = (functional.pad(part, (0, 0, 0, 1)) for part in (k, v))
        # As in the base class the hint takes the mask's place where nothing else needs the mask.
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else self._mask(attn_mask, key_padding_mask, q, k.shape[2])
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            weights = functional.dropout(weights, dropout)
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout, hinted)
        sequence_first = batched and not self.batch_first
        joined = mixed.permute((2, 0, 1, 3) if sequence_first else (0, 2, 1, 3)).flatten(2)
        output = functional.linear(joined, self.out_proj.weight, self.out_proj.bias)
        if batched:
            return output, weights
        return output.squeeze(0), None if weights is None else weights.squeeze(0)

    def _project(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Iterable[torch.Tensor]:
        """Return queries, keys and values, each of the inner width."""
        if self.in_proj_weight is None:
            matrices = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        elif query is key and key is value:
            return functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            matrices = [*self.in_proj_weight.chunk(3)]
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [functional.linear(*part) for part in zip((query, key, value), matrices, biases, strict=True)]

    def _split(self, part: torch.Tensor, batched: bool) -> torch.Tensor:
        """Return `(batch, heads, length, head_dim)`."""
        if not batched:
            part = part.unsqueeze(0)
        elif not self.batch_first:
            part = part.transpose(0, 1)
        return torch.unflatten(part, -1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(
        self, attention: torch.Tensor | None, padding: torch.Tensor | None, q: torch.Tensor, sources: int
    ) -> torch.Tensor | None:
        """Return what is added to the scores, broadcast to `(batch, heads, targets, sources)`."""
        if attention is not None:
            maps = q.shape[0] * self.num_heads
            if attention.dim() == 3 and attention.shape[0] != maps:
                raise StructureError(
                    f"an attention mask for every head must have batch · heads = {maps} maps now that heads are "
                    f"removed, but has {attention.shape[0]}; give one mask of two dimensions for all heads"
                )
            every = attention.dim() == 3
            attention = torch.unflatten(attention, 0, (-1, self.num_heads)) if every else attention[None, None]
        if padding is not None:
            padding = padding[:, None, None] if padding.dim() == 2 else padding[None, None, None]
        masks = [
            # Keys that the module adds itself are open to all.
            functional.pad(_additive(mask, q.dtype), (0, sources - mask.shape[-1]))
            for mask in (attention, padding)
            if mask is not None
        ]
        return sum(masks[1:], start=masks[0]) if masks else None

    def _nested(
        self, tokens: torch.Tensor, need_weights: bool, average: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within sequences of different lengths, as `nn.TransformerEncoder` makes them of padded ones."""
        lengths = [len(sequence) for sequence in tokens.unbind()]
        padded = tokens.to_padded_tensor(0.0)
        positions = torch.arange(padded.shape[1], device=padded.device)
        padding = positions >= torch.tensor(lengths, device=padded.device)[:, None]
        output, weights = self.forward(padded, padded, padded, padding, need_weights, None, average)
        rows = [row[:length] for row, length in zip(output, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows), weights


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask as numbers to add; True in a mask of booleans means closed."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
    return mask.to(dtype)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _outside_torch(model: nn.Module, name: str) -> str:
    """Return the name, or the nearest above it that is not a layer of torch's, whose sizes follow from its tensors."""
    while name and _is_torch_layer(model.get_submodule(name)):
        name = name.rpartition(".")[0]
    return name


def _is_torch_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.") and _path(type(module)) not in _KNOWN


def _below(model: nn.Module, owner: str) -> list[str]:
    parts = model.get_submodule(owner).named_modules(prefix=owner)
    return [name for name, part in parts if name != owner and not _is_torch_layer(part)]


def _speaks_of_heads(attributes: tuple[Attribute, ...]) -> int:
    """Return how far to the front a set belongs: what counts heads only by its value stands behind no change at all."""
    if not attributes:
        return 1
    return 2 if any(_HEADS.search(attribute.name) for attribute in attributes) else 0


def _guesses(model: nn.Module, owner: str, heads: int) -> list[tuple[Attribute, ...]]:
    """Return sets of a module's integers that could count heads, or features of all heads, the likeliest first."""
    module = model.get_submodule(owner)
    numbers = {name: value for name, value in vars(module).items() if type(value) is int}
    multiples = {name for name, value in numbers.items() if value > heads and value % heads == 0}
    sizes = {name for name in numbers if _SIZE.search(name)}
    repeats = {name for name in numbers if _REPEATS.search(name)}
    equal = {name for name in numbers.keys() - sizes if numbers[name] == heads}
    counts = {name for name in equal - repeats if _HEADS.search(name)} or equal - repeats
    queries = {name for name in multiples - sizes - repeats if _HEADS.search(name)}
    lengths = {length for parameter in module.parameters() for length in parameter.shape}
    widths = {name for name in multiples & sizes if numbers[name] in lengths and not _OF_ONE.search(name)}
    inner = {name for name in widths if not _MODEL.search(name)}
    sets = (
        counts | queries | inner,
        counts | queries | inner | (repeats & equal),
        counts | queries | widths,
        counts | queries,
        counts | inner,
        counts,
    )
    return [
        tuple(Attribute(owner, name, numbers[name] // heads) for name in names)
        for names in dict.fromkeys(tuple(sorted(names)) for names in sets)
        if names
    ]
