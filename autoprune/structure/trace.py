"""One run of a network that sees, operator by operator, which indices of which tensors go with which.

The run happens below autograd and all of Python's ways to spell an operation; what each operator does to labels is in
`tracer.py`. An operator that is not known there ends the labels that flow into it, and the run goes on. So a network
can't be too strange to be traced, only to be pruned everywhere.

Beside labels the trace holds what costs are made of (`cost/formula.py`): products, activations with their lifetimes,
and the calls of leaf modules.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoprune.errors import StructureError
from autoprune.inputs import call
from autoprune.seeds import kept_torch
from autoprune.structure.seen import Trace
from autoprune.structure.tracer import Tracer, tensors

__all__ = ["in_mode", "plain_attention", "trace", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model if it can be pruned as it is.

    Raises:
        StructureError: It is compiled, wrapped for several devices, or has no weights yet.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if hasattr(module, "_orig_mod"):
            way_out = "give the module that you passed to torch.compile, and compile the pruned network again"
        elif module._compiled_call_impl is not None:
            way_out = "call `compile` on the pruned network, not on the dense one"
        elif kind in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
            way_out = "give its `.module`, and wrap the pruned network again"
        elif isinstance(module, torch.jit.ScriptModule):
            way_out = "give the module that it was made from"
        else:
            continue
        raise StructureError(
            f"{f'`{name}`' if name else 'the model'} is a {kind}, whose code is out of reach: {way_out}"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise StructureError(
                f"`{name}` has no numbers yet: run a lazy network once on an input, or load the weights of one on the "
                "meta device"
            )
    return model


def trace(model: nn.Module, inputs: Any, *, training: bool = False) -> Trace:
    """Run a network once and return what was seen.

    Args:
        model: Any network; it runs in eval mode and is left as it was.
        inputs: What it is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
        training: Whether to run what the network runs in training only, such as auxiliary classifiers: modules that
            hold others are in training mode, those that hold none (dropout, batch-norm) in eval mode.

    Raises:
        StructureError: The network is compiled or wrapped, does not run on the input, or returns no tensor.
    """
    result = Trace()
    tracer = Tracer(unwrapped(model), result)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with (
            kept_torch(next((t.device for t in (*model.parameters(), *tensors(inputs))), None)),
            torch.no_grad(),
            plain_attention(),
            _watched(in_mode(model, training=training), tracer),
            tracer,
        ):
            tracer.begin(inputs)
            outputs = call(model, inputs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the network's own code raises
        first_line = next(iter(str(error).splitlines()), "no message")
        raise StructureError(
            f"{type(model).__name__} does not run on the example input: {type(error).__name__}: {first_line} "
            "(it ran on one sample, the first along the first dimension of every tensor)"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
        tracer.close()
    tracer.end(outputs)
    return result


def in_mode(model: nn.Module, *, training: bool) -> nn.Module:
    """Put a network in eval mode; with `training`, but for the modules that hold others. Returns the network."""
    model.eval()
    if training:
        for module in model.modules():
            module.training = any(True for _ in module.children())
    return model


@contextmanager
def plain_attention() -> Iterator[None]:
    """Make attention run as matrix products, which can be followed and counted, in place of fused operators."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _watched(model: nn.Module, tracer: "Tracer") -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(tracer.enter, name), with_kwargs=True))
        handles.append(module.register_forward_hook(tracer.leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
