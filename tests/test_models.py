"""Named models: sizes, names that published checkpoints use, and weights that fit or are refused."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autoprune import data, models
from autoprune.errors import ConfigError, UnknownNameError, WeightsError


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("plain20", 269_722),
        ("resnet8", 75_290 + (16 * 32 + 64) + (32 * 64 + 128)),
        # Convolutions, batch norms, and 512 x 10 + 10 of the one linear layer.
        ("vgg16_bn", 14_714_688 + 4_224 + 4_224 + 5_130),
        # As published (its 1000 classes: 3,504,872), with 1280 x 10 + 10 for the classifier's 1280 x 1000 + 1000.
        ("mobilenetv2", 3_504_872 - 1_281_000 + 12_810),
        ("lenet-300-100", 3 * 32 * 32 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10),
    ],
)
def test_exact_parameter_counts(name: str, expected: int) -> None:
    assert parameters(models.build(name)) == expected


@pytest.mark.parametrize(("name", "expected"), [("lenet-5", 431_080), ("lenet-300-100", 266_610)])
def test_the_lenets_have_on_mnist_the_size_that_pruning_papers_give(name: str, expected: int) -> None:
    assert parameters(models.build(name, in_channels=1, input_size=28)) == expected


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 8, 10), (1, 28, 10), (3, 32, 7)])
def test_channels_and_classes_follow_the_data(name: str, channels: int, size: int, classes: int) -> None:
    model = models.build(name, num_classes=classes, in_channels=channels, input_size=size).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, classes)


def test_parameters_are_named_as_in_the_published_checkpoints() -> None:
    names = set(models.build("resnet20").state_dict())
    blocks = {
        f"layer{stage}.{block}.{part}" for stage in (1, 2, 3) for block in (0, 1, 2) for part in ("conv1", "conv2")
    }
    norms = {name.replace("conv", "bn") for name in blocks} | {"bn1"}
    expected = {f"{name}.weight" for name in blocks | {"conv1", "linear"}} | {"linear.bias"}
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert names == expected | {f"{name}.{part}" for name in norms for part in parts}


def test_channel_pad_strides_and_pads_by_the_lengths_of_its_buffers() -> None:
    pad = models.ChannelPad(stride=2, left=1, right=2)
    x = torch.arange(1.0, 33.0).view(1, 2, 4, 4)
    out = pad(x)
    assert out.shape == (1, 5, 2, 2)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3, 4]].any()
    pad.left, pad.right = pad.left[:0], pad.right[:1]
    assert torch.equal(pad(x), out[:, 1:4])
    assert not pad.state_dict()


def test_a_plain_network_is_the_residual_one_without_its_shortcuts() -> None:
    residual, plain = models.build("resnet20"), models.build("plain20")
    plain.load_state_dict(residual.state_dict())
    assert not any(isinstance(module, models.ChannelPad) for module in plain.modules())
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(residual.eval()(x), plain.eval()(x))


@pytest.mark.usefixtures("global_rng_untouched")
def test_building_depends_on_the_seed_alone_and_leaves_the_global_generator() -> None:
    first, again, other = (models.build("resnet8", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_a_model_remembers_how_it_was_built_and_its_copies_too() -> None:
    model = models.build("resnet8", num_classes=3, in_channels=1, input_size=8)
    spec = models.ModelSpec("resnet8", 3, 1, 8)
    assert models.spec_of(model) == models.spec_of(copy.deepcopy(model)) == spec
    assert models.ModelSpec.from_dict(spec.to_dict()) == spec
    assert models.spec_of(nn.Linear(1, 1)) is None


@pytest.mark.parametrize("values", [{"name": "resnet8", "width": 2}, {}])
def test_a_spec_with_other_fields_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="described by name, num_classes"):
        models.ModelSpec.from_dict(values)


@pytest.mark.parametrize("field", ["num_classes", "in_channels", "input_size"])
def test_numbers_below_one_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"`{field} >= 1`"):
        models.build("resnet8", **{field: 0})


def test_an_image_too_small_for_lenet_5_is_refused() -> None:
    with pytest.raises(ConfigError, match="lenet-5 needs images"):
        models.build("lenet-5", input_size=3)


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet-20", "resnet20"), ("torchvision:resnet81", "torchvision:resnet18")]
)
def test_an_unknown_name_gets_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match=f"Did you mean '{nearest}'"):
        models.build(name)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:mobilenet_v2"])
def test_torchvision_models_follow_channels_and_classes(name: str) -> None:
    model = models.build(name, num_classes=4, in_channels=1).eval()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 4)
    assert models.spec_of(model) == models.ModelSpec(name, 4, 1, 32)


def test_torchvision_is_not_imported_for_our_own_models() -> None:
    code = (
        "import sys; from autoprune import models; models.build('resnet8'); before = 'torchvision' in sys.modules; "
        "models.build('torchvision:resnet18'); print(before, 'torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


# ---------------------------------------------------------------------------------------------------------- weights


@pytest.fixture
def model() -> nn.Module:
    return models.build("resnet8", in_channels=1, input_size=8)


def wrap(state: dict[str, torch.Tensor], how: str, path: Path) -> Path:
    parallel = {f"module.{key}": value for key, value in state.items()}
    content = {"plain": state, "state_dict": {"state_dict": parallel, "epoch": 3}, "model": {"model": state}}
    torch.save(content[how], path)
    return path


@pytest.mark.parametrize("how", ["plain", "state_dict", "model"])
def test_weights_load_from_every_wrapping(model: nn.Module, tmp_path: Path, how: str) -> None:
    state = models.build("resnet8", in_channels=1, seed=5).state_dict()
    models.load_weights(model, wrap(state, how, tmp_path / "weights.pt"))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_weights_load_from_safetensors_and_without_batch_counters(model: nn.Module, tmp_path: Path) -> None:
    state = models.build("resnet8", in_channels=1, seed=5).state_dict()
    kept = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    save_file(kept, tmp_path / "weights.safetensors")
    models.load_weights(model, tmp_path / "weights.safetensors")
    assert torch.equal(model.get_parameter("linear.weight"), state["linear.weight"])


def refuse(model: nn.Module, path: Path) -> str:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightsError) as caught:
        models.load_weights(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_number_of_classes_is_named(model: nn.Module, tmp_path: Path) -> None:
    other = models.build("resnet8", in_channels=1, num_classes=100).state_dict()
    message = refuse(model, wrap(other, "plain", tmp_path / "weights.pt"))
    total = len(model.state_dict())
    assert message == (
        f"{total - 2} of the model's {total} tensors fit weights.pt; the first that is mis-shaped is linear.weight: "
        "100x64 in the file, 10x64 wanted; build the model for the file's 100 classes (num_classes=100)"
    )


def test_missing_unexpected_and_misshaped_tensors_are_named(model: nn.Module, tmp_path: Path) -> None:
    state = model.state_dict()
    missing = {key: value for key, value in state.items() if key != "conv1.weight"}
    assert "missing is conv1.weight: 16x1x3x3" in refuse(model, wrap(missing, "plain", tmp_path / "a.pt"))
    unexpected = state | {"extra": torch.zeros(2)}
    assert "unexpected is extra: 2 in the file" in refuse(model, wrap(unexpected, "plain", tmp_path / "b.pt"))
    misshaped = state | {"conv1.weight": torch.zeros(16, 3, 3, 3)}
    message = refuse(model, wrap(misshaped, "plain", tmp_path / "c.pt"))
    assert "conv1.weight: 16x3x3x3 in the file, 16x1x3x3 wanted; is this another architecture?" in message


def test_files_that_hold_no_weights_are_refused(model: nn.Module, tmp_path: Path) -> None:
    assert "there is no weights file" in refuse(model, tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    torch.save(nn.Linear(1, 1), tmp_path / "pickled.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("text.pt", "text.safetensors", "pickled.pt"):
        assert "can't be read as weights" in refuse(model, tmp_path / name)
    assert "holds no state dict" in refuse(model, tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("name", "file", "published"),
    [("resnet20", "resnet20-12fca82f.th", 0.9173), ("resnet56", "resnet56-4bfd9763.th", 0.9339)],
)
def test_published_checkpoints_reach_their_accuracy(
    name: str, file: str, published: float, weights_dir: Path, data_root: Path
) -> None:
    model = models.build(name).eval()
    models.load_weights(model, weights_dir / file)
    subset = data.subset(data.load("cifar10", data_root).test, torch.arange(1000))
    with torch.no_grad():
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in subset.batches(250))
    standard_error = (published * (1 - published) / 1000) ** 0.5
    assert abs(correct / 1000 - published) < 2.5 * standard_error
