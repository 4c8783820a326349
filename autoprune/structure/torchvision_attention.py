"""Forwards for torchvision's attention with fewer heads than features allow; nothing else imports torchvision here.

Window attention: Liu et al. 2021 (arXiv:2103.14030) and, with cosine scores, 2022 (arXiv:2111.09883); relative
attention of MaxViT: Tu et al. 2022 (arXiv:2204.01697).
"""

import math

import torch
from torch import nn
from torch.nn import functional
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

__all__ = ["FewerHeadsRelativeAttention", "FewerHeadsWindowAttention", "FewerHeadsWindowAttentionV2", "refit"]

_CLOSED = -100.0
"""What torchvision adds to the scores between tokens that a shift brought together: large, not infinite."""


class FewerHeadsWindowAttention(ShiftedWindowAttention):  # type: ignore[misc] # torchvision has no types
    """Attention in windows, its heads together narrower than the features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take and return `(batch, height, width, features)`."""
        return _attend_in_windows(self, x, self.qkv.bias)

    def scaled(self, queries: torch.Tensor) -> torch.Tensor:
        """Return queries `(..., heads, tokens, head_dim)` of a length that does not grow with the head."""
        scale: float = queries.shape[-1] ** -0.5
        return queries * scale

    def scores(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return products of `(..., heads, tokens, head_dim)` with each other."""
        return queries @ keys.transpose(-2, -1)


class FewerHeadsWindowAttentionV2(ShiftedWindowAttentionV2):  # type: ignore[misc] # torchvision has no types
    """Attention in windows by cosine, its heads together narrower than the features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take and return `(batch, height, width, features)`."""
        bias = self.qkv.bias
        if bias is not None:  # keys have none
            of_queries, of_keys, of_values = bias.chunk(3)
            bias = torch.cat([of_queries, torch.zeros_like(of_keys), of_values])
        return _attend_in_windows(self, x, bias)

    def scaled(self, queries: torch.Tensor) -> torch.Tensor:
        """Return the queries as they are: cosines do not depend on their length."""
        return queries

    def scores(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return scaled cosines of `(..., heads, tokens, head_dim)` with each other."""
        cosines = functional.normalize(queries, dim=-1) @ functional.normalize(keys, dim=-1).transpose(-2, -1)
        scaled: torch.Tensor = cosines * self.logit_scale.clamp(max=math.log(100.0)).exp()
        return scaled


class FewerHeadsRelativeAttention(RelativePositionalMultiHeadAttention):  # type: ignore[misc] # torchvision has no types
    """MaxViT's attention, its heads together narrower than the features; scores are scaled as the whole was."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take and return `(batch, groups, tokens, features)`."""
        split = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim))
        q, k, v = split.permute(3, 0, 1, 4, 2, 5)
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        output: torch.Tensor = self.merge((scores.softmax(dim=-1) @ v).transpose(2, 3).flatten(3))
        return output


_REFITTED: dict[type[nn.Module], type[nn.Module]] = {
    ShiftedWindowAttention: FewerHeadsWindowAttention,
    ShiftedWindowAttentionV2: FewerHeadsWindowAttentionV2,
    RelativePositionalMultiHeadAttention: FewerHeadsRelativeAttention,
}


def refit(module: nn.Module) -> None:
    """Give one of the three classes the forward for fewer heads, if it has fewer; see `heads.refit`."""
    packed = next(weight for name, weight in module.named_parameters() if name.endswith("qkv.weight"))
    if packed.shape[0] != 3 * packed.shape[1]:
        module.__class__ = _REFITTED[type(module)]


def _attend_in_windows(
    module: FewerHeadsWindowAttention | FewerHeadsWindowAttentionV2, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Attend within shifted windows; dropout, padding and mask as torchvision has them.

    Activations are let go where torchvision lets them go, so that its peak of memory is the one with all heads.
    """
    position_bias = module.get_relative_position_bias()
    _, height, width, _ = x.shape
    window = (module.window_size[0], module.window_size[1])
    x = functional.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    sizes = (x.shape[1], x.shape[2])
    # A single window has nothing to be shifted against.
    shift = [0 if window[axis] >= sizes[axis] else module.shift_size[axis] for axis in range(2)]
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    x = _windows(x, window)
    packed = functional.linear(x, module.qkv.weight, bias)
    split = torch.unflatten(packed, -1, (3, module.num_heads, -1))
    q, k, v = split.permute(4, 0, 1, 2, 5, 3, 6)  # each (batch, rows, columns, heads, tokens, head_dim)
    q = module.scaled(q)
    scores = module.scores(q, k)
    scores = scores + position_bias
    if any(shift):
        scores = scores + _between_parts(sizes, shift, window, x)
    scores = scores.softmax(dim=-1)
    weights = functional.dropout(scores, module.attention_dropout, module.training)
    x = (weights @ v).transpose(3, 4).flatten(4)
    x = functional.linear(x, module.proj.weight, module.proj.bias)
    x = functional.dropout(x, module.dropout, module.training)
    x = torch.unflatten(x, 3, window).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if any(shift):
        x = x.roll((shift[0], shift[1]), (1, 2))
    return x[:, :height, :width].contiguous()


def _between_parts(
    sizes: tuple[int, int], shift: list[int], window: tuple[int, int], like: torch.Tensor
) -> torch.Tensor:
    """Return what is added to the scores between tokens that only a shift brought into one window.

    Returns:
        `(1, rows, columns, 1, tokens, tokens)`.
    """
    late = [torch.arange(sizes[axis], device=like.device) >= sizes[axis] - shift[axis] for axis in range(2)]
    parts = _windows((2 * late[0][:, None] + 1 * late[1])[None, :, :, None], window).squeeze(-1)
    apart = parts.unsqueeze(-1) != parts.unsqueeze(-2)
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, _CLOSED).unsqueeze(3)


def _windows(x: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Return `(batch, rows, columns, tokens, features)` of `(batch, height, width, features)`."""
    tall = torch.unflatten(torch.unflatten(x, 2, (-1, window[1])), 1, (-1, window[0]))
    return tall.transpose(2, 3).flatten(3, 4)
