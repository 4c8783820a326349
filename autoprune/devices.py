"""What is particular to accelerators: which one is meant, numbers that repeat, batches on their way there."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from autoprune.errors import ConfigError

__all__ = ["AUTO", "exact", "nearest", "resolve", "streamed", "synchronise"]

AUTO: Final = "auto"
"""The accelerator, if there is one; else the CPU."""
_UNDER_WAY: Final = 2  # batches whose copies are not known to be done

Batch = tuple[torch.Tensor, torch.Tensor]


def resolve(name: str) -> torch.device:
    """Return the device of a name.

    Args:
        name: As in `torch.device`, such as "cpu", "cuda" (which is "cuda:0") or "cuda:1"; or `AUTO`, which passes over
            an accelerator that can't compute in float64.

    Raises:
        ConfigError: There is none such here, or it can't compute in float64, in which layers are fitted.
    """
    cpu, *accelerators = there = _there()
    if name == AUTO:
        return next((device for device in accelerators if _fault(device) is None), cpu)
    try:
        device = torch.device(name)
    except RuntimeError:  # no such word
        device = torch.device("meta")
    device = cpu if device.type == "cpu" else torch.device(device.type, device.index or 0)
    if device not in there:
        raise ConfigError(f"there is no device '{name}' here; there are: {', '.join(map(str, there))}")
    fault = _fault(device)
    if fault is not None:
        raise ConfigError(f"{device} can't compute in float64, in which layers are fitted ({fault}); take cpu")
    return device


def nearest(device: torch.device) -> torch.device:
    """Return a device if it is here, else the first of its kind, else the CPU; a worker sees but its own share."""
    there = _there()
    alike = [one for one in there if one.type == device.type]
    return device if device in there else (alike or there)[0]


def _there() -> list[torch.device]:
    """Return the devices here; the CPU is the first."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    numbers = range(0 if kind is None else torch.accelerator.device_count())
    return [torch.device("cpu"), *(torch.device(str(kind), number) for number in numbers)]


def _fault(device: torch.device) -> str | None:
    """Return why a device can't compute in float64, or None."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:
        return " ".join(str(error).split())[:100]
    return None


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def exact() -> Iterator[None]:
    """Let CUDA compute the same each time inside a `with`, and float32 in float32; nothing where it was not used yet.

    Else convolutions in float32 are rounded to ten bits (TF32), and how they are computed may depend on the clock or on
    which thread adds first. Operators that are not cuDNN's, such as the gradient of pooling, may still differ by
    rounding from one run to the next.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        yield
        return
    cudnn: Any = torch.backends.cudnn  # whose attributes have no types
    parts: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    flags, precisions = (cudnn.benchmark, cudnn.deterministic), [part.fp32_precision for part in parts]
    try:
        allowed = cudnn.allow_tf32
    except RuntimeError:  # the program has set its parts to different values
        allowed = None
    try:
        cudnn.benchmark, cudnn.deterministic = False, True
        if allowed is not None:
            cudnn.allow_tf32 = False  # code that asks for it gets an error where it contradicts the parts
        for part in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        if allowed is not None:
            cudnn.allow_tf32 = allowed
        for part, precision in zip(parts, precisions, strict=True):
            part.fp32_precision = precision
        cudnn.benchmark, cudnn.deterministic = flags


def streamed(
    batches: Iterable[Batch], place: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> Iterator[Batch]:
    """Yield batches on a device.

    To CUDA they are copied from page-locked memory, which nobody waits for: while one is computed the next is read and
    handed over. No more than two are under way, so that a slow device does not fill the memory. What is there
    already is not waited for.

    Args:
        batches: `(inputs, targets)`, on any device.
        place: Puts inputs on the device, without waiting where it can.
        device: Where.
    """
    if device.type != "cuda":
        for inputs, targets in batches:
            yield place(inputs), targets.to(device)
        return
    under_way: deque[Any] = deque()
    for inputs, targets in batches:
        if inputs.device == targets.device == device:
            yield place(inputs), targets
            continue
        if len(under_way) == _UNDER_WAY:
            under_way.popleft().synchronize()
        placed = place(_locked(inputs)), _locked(targets).to(device, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        copied.record(torch.cuda.current_stream(device))
        under_way.append(copied)
        yield placed


def _locked(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in page-locked memory, if it is not on a device already."""
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor
