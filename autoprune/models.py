"""Named models, how they were built, and loading weights into any model; nothing here trains or prunes."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune.errors import ConfigError, UnknownNameError, WeightsError

__all__ = [
    "BasicBlock",
    "ChannelPad",
    "CifarResNet",
    "ModelSpec",
    "build",
    "load_weights",
    "names",
    "save_weights",
    "spec_of",
]

Shortcut = Literal["pad", "projection", "none"]

_TORCHVISION = "torchvision:"
_SPEC_ATTRIBUTE = "_autoprune_spec"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """How a named model was built: all that `build` needs to build it again.

    Attributes:
        name: One of `names()`, or `torchvision:NAME`.
        num_classes: How many outputs.
        in_channels: Channels of an input image.
        input_size: Height and width of an input image, in pixels.

    Raises:
        ConfigError: A number is smaller than 1.
    """

    name: str
    num_classes: int = 10
    in_channels: int = 3
    input_size: int = 32

    def __post_init__(self) -> None:
        for field in ("num_classes", "in_channels", "input_size"):
            if getattr(self, field) < 1:
                raise ConfigError(f"`{field} >= 1` must hold for a model, but got {field}={getattr(self, field)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned.

        Raises:
            ConfigError: A field is missing, unknown or out of range.
        """
        try:
            return cls(**values)
        except TypeError as error:
            fields = ", ".join(field.name for field in dataclasses.fields(cls))
            raise ConfigError(f"a model is described by {fields}, but got {', '.join(values) or 'nothing'}") from error


class ChannelPad(nn.Module):
    """The parameter-free shortcut: every `stride`-th pixel, with zero channels added on both sides.

    Option A of He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2
    (https://arxiv.org/abs/1512.03385). The buffers `left` and `right` are the zeros of one pixel, so that surgery can
    slice padding like any other tensor. They are not part of `state_dict`.

    Args:
        stride: Step between the pixels kept.
        left: Zero channels put before the input's.
        right: Zero channels put behind the input's.
    """

    left: Tensor
    right: Tensor

    def __init__(self, stride: int, left: int, right: int) -> None:
        super().__init__()
        self.stride = stride
        self.register_buffer("left", torch.zeros(left), persistent=False)
        self.register_buffer("right", torch.zeros(right), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, c, h, w)` to `(n, left + c + right, ceil(h / stride), ceil(w / stride))`."""
        strided = x[:, :, :: self.stride, :: self.stride]
        samples, _, height, width = strided.shape
        left, right = (
            zeros.to(strided)[None, :, None, None].expand(samples, -1, height, width)
            for zeros in (self.left, self.right)
        )
        return torch.cat([left, strided, right], dim=1)

    def extra_repr(self) -> str:
        """Return what tells two of these apart."""
        return f"stride={self.stride}, left={self.left.numel()}, right={self.right.numel()}"


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def _shortcut(kind: Shortcut, inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if kind == "none":
        return None
    if inputs == outputs and stride == 1:
        return nn.Identity()
    if kind == "pad":
        added = outputs - inputs
        return ChannelPad(stride, added // 2, added - added // 2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them; without the shortcut, a block of a plain network."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(shortcut, inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, inputs, h, w)` to `(n, outputs, ceil(h / stride), ceil(w / stride))`."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out if self.shortcut is None else out + self.shortcut(x))


class CifarResNet(nn.Module):
    """The residual network for CIFAR of He et al. 2016, section 4.2: stem of 16, three stages of 16, 32 and 64.

    Parameters are named as in akamaster/pytorch_resnet_cifar10, so that its checkpoints load.

    Args:
        blocks: Blocks in each stage; the depth is `6 * blocks + 2`.
        shortcut: "pad" (option A), "projection" (option B) or "none" (the paper's plain network).
        in_channels: Channels of an input image.
        num_classes: How many outputs.
    """

    def __init__(self, blocks: int, shortcut: Shortcut, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, 1, shortcut)
        self.layer2 = self._stage(blocks, 16, 32, 2, shortcut)
        self.layer3 = self._stage(blocks, 32, 64, 2, shortcut)
        self.linear = nn.Linear(64, num_classes)
        _initialise(self)

    @staticmethod
    def _stage(blocks: int, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
        rest = [BasicBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(inputs, outputs, stride, shortcut), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(n, in_channels, h, w)` to class scores `(n, num_classes)`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        scores: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return scores


def _initialise(model: nn.Module) -> None:
    """Draw all convolution and linear weights as in He et al. 2015 (https://arxiv.org/abs/1502.01852), in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _resnet(spec: ModelSpec, *, depth: int, shortcut: Shortcut) -> nn.Module:
    return CifarResNet((depth - 2) // 6, shortcut, spec.in_channels, spec.num_classes)


class _Vgg(nn.Module):
    """Convolutions, global average, one linear layer; see `_vgg16_bn`."""

    def __init__(self, features: nn.Sequential, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return scores


def _vgg16_bn(spec: ModelSpec) -> nn.Module:
    """VGG-16 (configuration D of https://arxiv.org/abs/1409.1556) with batch norm and, as usual for 32x32, one linear.

    Images too small for five poolings get as many as fit.
    """
    features: list[nn.Module] = []
    channels, size = spec.in_channels, spec.input_size
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            features += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        if size >= 2:
            features.append(nn.MaxPool2d(2))
            size //= 2
    model = _Vgg(nn.Sequential(*features), channels, spec.num_classes)
    _initialise(model)
    return model


def _mobilenetv2(spec: ModelSpec, *, width: float) -> nn.Module:
    """MobileNetV2 (https://arxiv.org/abs/1801.04381) of a width, for small images: strides of 8 in all, not of 32."""
    from torchvision.models import MobileNetV2

    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 1], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    model = MobileNetV2(spec.num_classes, width_mult=width, inverted_residual_setting=stages)
    if spec.in_channels != 3:
        _rebuild_first_conv(model, spec.in_channels)
    return cast(nn.Module, model)


def _lenet_300_100(spec: ModelSpec) -> nn.Module:
    """The fully connected network of LeCun et al. 1998: two hidden layers, of 300 and 100."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(spec.in_channels * spec.input_size**2, 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            fc3=nn.Linear(100, spec.num_classes),
        )
    )


def _lenet_5(spec: ModelSpec) -> nn.Module:
    """LeNet-5 as pruning papers use it (20-50-500, 431,080 parameters on MNIST; https://arxiv.org/abs/1506.02626).

    Images smaller than 16x16 keep their size through the convolutions (padding 2).
    """
    padding = 2 if spec.input_size < 16 else 0
    size = spec.input_size
    for _ in range(2):
        size = (size - 4 + 2 * padding) // 2
    if size < 1:
        raise ConfigError(f"lenet-5 needs images of 4x4 or more, but got {spec.input_size}; lenet-300-100 takes any")
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(spec.in_channels, 20, 5, padding=padding),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5, padding=padding),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(50 * size**2, 500),
            relu3=nn.ReLU(),
            fc2=nn.Linear(500, spec.num_classes),
        )
    )


# The two that add auxiliary outputs while they train, which no loss here could use.
_WITHOUT_AUXILIARY = MappingProxyType({"aux_logits": False, "init_weights": True})


def _torchvision(spec: ModelSpec) -> nn.Module:
    import torchvision

    name = spec.name.removeprefix(_TORCHVISION)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UnknownNameError("model", spec.name, [_TORCHVISION + model for model in known])
    options = _WITHOUT_AUXILIARY if name in {"googlenet", "inception_v3"} else {}
    model = cast(nn.Module, torchvision.models.get_model(name, weights=None, num_classes=spec.num_classes, **options))
    if spec.in_channels != 3:
        _rebuild_first_conv(model, spec.in_channels)
    return model


def _rebuild_first_conv(model: nn.Module, in_channels: int) -> None:
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        cast(tuple[int, int], old.kernel_size),
        stride=cast(tuple[int, int], old.stride),
        padding=cast(tuple[int, int], old.padding),
        dilation=cast(tuple[int, int], old.dilation),
        bias=old.bias is not None,
    )
    model.set_submodule(name, new)


_BUILDERS: Mapping[str, Callable[[ModelSpec], nn.Module]] = MappingProxyType(
    {
        "lenet-300-100": _lenet_300_100,
        "lenet-5": _lenet_5,
        "mobilenetv2": partial(_mobilenetv2, width=1.0),
        "mobilenetv2_half": partial(_mobilenetv2, width=0.5),
        "plain20": partial(_resnet, depth=20, shortcut="none"),
        "resnet8": partial(_resnet, depth=8, shortcut="projection"),
        "resnet20": partial(_resnet, depth=20, shortcut="pad"),
        "resnet32": partial(_resnet, depth=32, shortcut="pad"),
        "resnet44": partial(_resnet, depth=44, shortcut="pad"),
        "resnet56": partial(_resnet, depth=56, shortcut="pad"),
        "vgg16_bn": _vgg16_bn,
    }
)


def names() -> list[str]:
    """Return the names that `build` takes, besides `torchvision:NAME`, sorted."""
    return sorted(_BUILDERS)


def build(name: str, *, num_classes: int = 10, in_channels: int = 3, input_size: int = 32, seed: int = 0) -> nn.Module:
    """Build a named model with fresh weights, which depend on `seed` alone; global generators are left as they were.

    Args:
        name: One of `names()`, or `torchvision:NAME` for any classification network of torchvision, untrained.
        num_classes: How many outputs.
        in_channels: Channels of an input image.
        input_size: Height and width of an input image, in pixels.
        seed: Of the initial weights.

    Returns:
        The model, on the CPU, in training mode; `spec_of` tells how it was built.

    Raises:
        UnknownNameError: There is no model of that name.
        ConfigError: A number is out of range, or the image too small for this model.
    """
    spec = ModelSpec(name, num_classes, in_channels, input_size)
    if name.startswith(_TORCHVISION):
        builder: Callable[[ModelSpec], nn.Module] = _torchvision
    elif name in _BUILDERS:
        builder = _BUILDERS[name]
    else:
        raise UnknownNameError("model", name, [*_BUILDERS, f"{_TORCHVISION}NAME"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = builder(spec)
    setattr(model, _SPEC_ATTRIBUTE, spec.to_dict())
    return model


def spec_of(module: nn.Module) -> ModelSpec | None:
    """Return how `build` built this module, or None for a module of other origin; copies keep it."""
    values = getattr(module, _SPEC_ATTRIBUTE, None)
    return None if values is None else ModelSpec.from_dict(values)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a network's tensors to a `.safetensors` file that `load_weights` reads.

    Raises:
        WeightsError: The file can't be written.
    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    try:
        save_file(state, path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"can't write the weights to {path}: {error}; name another file") from error


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights from a file into a model, in place; all of them, or none and an error.

    Reads `.safetensors`, and whatever `torch.load(weights_only=True)` reads: a state dict, or one under the key
    "state_dict" or "model". A prefix "module.", which data-parallel training leaves, is dropped. The batch counters
    of batch-norm layers may be missing.

    Raises:
        WeightsError: The file is missing or unreadable, or its tensors are not the model's.
    """
    path = Path(path)
    given = _read_state(path)
    own = model.state_dict()
    wanted = {key: tensor.shape for key, tensor in own.items()}
    missing = [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in wanted]
    misshaped = [key for key in wanted if key in given and given[key].shape != wanted[key]]
    if missing or unexpected or misshaped:
        fitting = sum(key in given and given[key].shape == wanted[key] for key in wanted)
        what, way_out = "", "is this another architecture?"
        if misshaped:
            key = misshaped[0]
            what = f"the first that is mis-shaped is {key}: {_shape(given[key])} in the file, {_shape(own[key])} wanted"
            last = next(reversed(wanted)).rpartition(".")[0]
            if not missing and not unexpected and all(name.rpartition(".")[0] == last for name in misshaped):
                classes = given[misshaped[0]].shape[0]
                way_out = f"build the model for the file's {classes} classes (num_classes={classes})"
        elif missing:
            what = f"the first that is missing is {missing[0]}: {_shape(own[missing[0]])} wanted"
        else:
            what = f"the first that is unexpected is {unexpected[0]}: {_shape(given[unexpected[0]])} in the file"
        raise WeightsError(f"{fitting} of the model's {len(wanted)} tensors fit {path.name}; {what}; {way_out}")
    model.load_state_dict(given, strict=False)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(f"there is no weights file {path}; give the path of a .safetensors or state-dict file")
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # pickle, zip and safetensors each raise their own
        first_line = str(error).strip().partition("\n")[0]
        raise WeightsError(
            f"{path.name} can't be read as weights ({first_line[:120]}); save a state_dict(), not the network"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path.name} holds no state dict (names and tensors); save the network's state_dict()")
    prefix = "module." if content and all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}
