"""Saved networks: what is written loads to the same outputs, or is refused."""

import copy
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoprune import models
from autoprune.errors import AutopruneWarning, ConfigError, RunError, WeightsError
from autoprune.export import PROGRAM, RECIPE, WEIGHTS, load, recipe_of, save, to_onnx
from autoprune.structure import Cut, Structure, Weakest, analyse, cut, plan
from autoprune.testing import TinyNet, TinyResNet

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

MEASURED = {"policy": {"conv1": 0.5}, "accuracy": 0.9}


def seeded(make: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return make().eval()


def inputs(n: int, channels: int = 1, size: int = 8) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(n))


def one_line(error: pytest.ExceptionInfo[Any]) -> bool:
    return "\n" not in str(error.value)


class Pruned:
    """A network without every third element of each group, and all that `save` wants to know of it."""

    def __init__(self, dense: nn.Module, example: Tensor) -> None:
        self.dense = dense.eval()
        self.example = example
        self.structure: Structure = analyse(dense, example)
        self.removed = {group.name: list(range(0, group.size - 1, 3)) for group in self.structure}
        self.change = plan(dense, self.structure, self.removed)
        self.model = cut(dense, self.change)

    def save(self, folder: Path, **changes: Any) -> Path:
        given = {"dense": self.dense, "change": self.change, "example_input": self.example, "measured": MEASURED}
        return save(changes.pop("model", self.model), folder, **given | changes)


@pytest.fixture(scope="module")
def own() -> Pruned:
    return Pruned(seeded(TinyResNet), inputs(1))


@pytest.fixture(scope="module")
def own_saved(own: Pruned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own.save(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def named() -> Pruned:
    return Pruned(models.build("resnet8", in_channels=1, input_size=8, num_classes=7), inputs(1))


@pytest.fixture(scope="module")
def named_saved(named: Pruned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return named.save(tmp_path_factory.mktemp("named"))


# --------------------------------------------------------------------------------------------------------- round trips


def test_a_named_network_loads_without_help(named: Pruned, named_saved: Path) -> None:
    loaded = load(named_saved)
    assert not loaded.training
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in named.dense.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(inputs(5)), named.model(inputs(5)))


def test_a_network_of_ones_own_class_needs_the_class(own: Pruned, own_saved: Path) -> None:
    loaded = load(own_saved, build=TinyResNet)
    with torch.no_grad():
        assert torch.equal(loaded(inputs(5)), own.model(inputs(5)))
    with pytest.raises(ConfigError, match=r"holds a autoprune\.testing\.TinyResNet, .*build=make_model") as error:
        load(own_saved)
    assert one_line(error)


def test_build_may_return_any_weights_and_is_not_changed(own_saved: Path) -> None:
    built = seeded(TinyResNet)
    before = copy.deepcopy(built.state_dict())
    loaded = load(own_saved, build=lambda: built)
    assert loaded is not built
    assert all(torch.equal(before[name], tensor) for name, tensor in built.state_dict().items())


def test_other_precisions_stay(own: Pruned, tmp_path: Path) -> None:
    double = copy.deepcopy(own.model).double()
    own.save(tmp_path, model=double, example_input=inputs(1).double())
    loaded = load(tmp_path, build=TinyResNet)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}


def test_the_recipe_is_readable_and_tells_what_was_kept(own: Pruned, own_saved: Path) -> None:
    recipe = json.loads((own_saved / RECIPE).read_text())
    assert recipe == recipe_of(own_saved)
    assert recipe["format"] == 2
    assert recipe["model"] is None
    assert recipe["input"] == {"shape": [1, 1, 8, 8], "dtype": "float32"}
    assert recipe["measured"] == MEASURED
    assert recipe["cut"]["kept"]["stem.weight"] == {"0": [1, 2, 4, 5, 7]}
    assert recipe["cut"]["kept"]["conv1.weight"] == {"0": [1, 2, 4, 5, 7], "1": [1, 2, 4, 5, 7]}


def test_a_named_recipe_says_how_to_build(named_saved: Path) -> None:
    assert recipe_of(named_saved)["model"] == {"name": "resnet8", "num_classes": 7, "in_channels": 1, "input_size": 8}


class Grouped(nn.Module):
    """A residual block that may go, behind a convolution in groups, whose number of groups shrinks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.inner, self.fc = Residual(), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.inner(self.grouped(self.stem(images)).relu())
        return self.fc(features.mean((2, 3)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)  # type: ignore[no-any-return]


def test_attributes_blocks_and_zeros_survive(tmp_path: Path) -> None:
    dense = seeded(Grouped)
    structure = analyse(dense, inputs(1), kinds=("channels", "blocks", "weights"))
    removed = {"stem": [1], "inner": [0], "fc:weights": Weakest(40, dense.get_parameter("fc.weight").detach().abs())}
    change = plan(dense, structure, removed)
    model = cut(dense, change)
    save(model, tmp_path, dense=dense, change=change, example_input=inputs(1), measured={})
    recipe = recipe_of(tmp_path)["cut"]
    assert recipe["attributes"] == {"grouped": {"groups": 3}}
    assert recipe["blocks"] == ["inner"]
    assert recipe["zeroed"] == ["fc.weight"]
    assert recipe["kept"]["grouped.weight"] == {"0": [0, 1, 4, 5, 6, 7]}
    loaded = load(tmp_path, build=Grouped)
    assert int((loaded.get_parameter("fc.weight") == 0).sum()) == 30  # half of what the channels left
    with torch.no_grad():
        assert torch.equal(loaded(inputs(5)), model(inputs(5)))
        program = torch.export.load(tmp_path / PROGRAM).module()
        torch.testing.assert_close(program(inputs(3)), model(inputs(3)), rtol=1e-4, atol=1e-5)


def test_a_named_network_without_a_block_loads_without_help(tmp_path: Path) -> None:
    dense = models.build("resnet8", in_channels=1, input_size=8).eval()
    change = Cut(blocks=("layer1.0",))
    model = cut(dense, change)
    save(model, tmp_path, dense=dense, change=change, example_input=inputs(1), measured={})
    loaded = load(tmp_path)
    assert not list(loaded.get_submodule("layer1.0").parameters())
    with torch.no_grad():
        assert torch.equal(loaded(inputs(3)), model(inputs(3)))


def test_weights_are_plain_safetensors(own: Pruned, own_saved: Path) -> None:
    tensors = load_file(own_saved / WEIGHTS)
    assert tensors.keys() == own.model.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in own.model.state_dict().items())


@pytest.mark.parametrize("batch", [1, 2, 3, 17])
def test_the_program_needs_no_class_and_takes_any_batch(own: Pruned, own_saved: Path, batch: int) -> None:
    program = torch.export.load(own_saved / PROGRAM).module()
    with torch.no_grad():
        torch.testing.assert_close(program(inputs(batch)), own.model(inputs(batch)), rtol=1e-4, atol=1e-5)


def test_saving_again_replaces_what_was_there(own: Pruned, tmp_path: Path) -> None:
    own.save(tmp_path)
    other = copy.deepcopy(own.model)
    other.get_parameter("fc.bias").data += 1.0
    own.save(tmp_path, model=other)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([WEIGHTS, RECIPE, PROGRAM])
    with torch.no_grad():
        assert torch.equal(load(tmp_path, build=TinyResNet)(inputs(2)), other(inputs(2)))
        shifted = torch.export.load(tmp_path / PROGRAM).module()(inputs(2))
        torch.testing.assert_close(shifted, own.model(inputs(2)) + 1.0, rtol=1e-4, atol=1e-5)


def test_neither_network_is_changed_by_saving(own: Pruned, tmp_path: Path) -> None:
    model = copy.deepcopy(own.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before, dense = copy.deepcopy(model.state_dict()), copy.deepcopy(own.dense.state_dict())
    own.save(tmp_path, model=model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.get_parameter("conv1.weight").is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(dense[name], tensor) for name, tensor in own.dense.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_does_not_load_to_the_same_outputs_is_refused(tmp_path: Path) -> None:
    """The recipe says that other channels of the input were kept: shapes fit, the outputs do not."""

    class Scaled(TinyNet):  # type: ignore[misc]  # final, but this is a deliberately broken subject
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.arange(1.0, 9.0), persistent=False)

        def forward(self, images: Tensor) -> Tensor:
            features = self.relu(self.bn1(self.conv1(images))) * self.scale.view(1, -1, 1, 1)
            return self.fc(self.relu(self.bn2(self.conv2(features))).mean((2, 3)))  # type: ignore[no-any-return]

    dense = seeded(Scaled)
    kept = {
        "scale": {0: torch.arange(4)},
        **{name: {0: torch.arange(4)} for name in ("conv1.weight", "conv1.bias")},
        **{f"bn1.{name}": {0: torch.arange(4)} for name in ("weight", "bias", "running_mean", "running_var")},
        "conv2.weight": {1: torch.arange(4)},
    }
    model = cut(dense, Cut(kept))
    save(model, tmp_path / "right", dense=dense, change=Cut(kept), example_input=inputs(1), measured={})
    wrong = kept | {"scale": {0: torch.arange(4, 8)}}
    with pytest.raises(
        RunError, match=r"the reloaded network differs from the one that was saved by [0-9.e+-]+"
    ) as error:
        save(model, tmp_path / "wrong", dense=dense, change=Cut(wrong), example_input=inputs(1), measured={})
    assert one_line(error)


def test_nan_outputs_are_refused(own: Pruned, tmp_path: Path) -> None:
    broken = copy.deepcopy(own.model)
    broken.get_parameter("fc.bias").data.fill_(torch.nan)
    with pytest.raises(RunError, match="differs"):
        own.save(tmp_path, model=broken)


def test_kept_indices_that_do_not_fit_are_refused(own: Pruned, tmp_path: Path) -> None:
    change = Cut({**own.change.kept, "stem.weight": {0: torch.arange(3)}})
    with pytest.raises(WeightsError, match="don't fit a TinyResNet") as error:
        own.save(tmp_path, change=change)
    assert one_line(error)


def test_a_named_network_that_was_changed_afterwards_is_one_of_its_own(tmp_path: Path) -> None:
    """Its name would rebuild another network."""
    dense = models.build("lenet-5", in_channels=1, input_size=28)
    activation = next(name for name, module in dense.named_modules() if isinstance(module, nn.ReLU | nn.Tanh))
    parent, _, child = activation.rpartition(".")
    setattr(dense.get_submodule(parent), child, nn.Sigmoid())
    pruned = Pruned(dense, inputs(1, size=28))
    pruned.save(tmp_path)
    assert recipe_of(tmp_path)["model"] is None
    with torch.no_grad():
        assert torch.equal(load(tmp_path, build=lambda: dense)(inputs(2, size=28)), pruned.model(inputs(2, size=28)))


@pytest.mark.parametrize("wrong", ["other", "narrow", "shallow"])
def test_a_wrong_build_is_one_line(own_saved: Path, wrong: str) -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 4, 3, bias=False)

    def build() -> nn.Module:
        if wrong == "other":
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        if wrong == "narrow":
            return Narrow()
        model = TinyResNet()
        del model.bn2
        return model

    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(WeightsError, match=r"don't fit a .*does `build` make") as error,
    ):
        load(own_saved, build=build)
    assert one_line(error)


def test_a_folder_that_is_no_saved_network(own_saved: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"has no {re.escape(RECIPE)}") as error:
        load(tmp_path)
    assert one_line(error)
    for number in (1, 99):
        (tmp_path / RECIPE).write_text(json.dumps(recipe_of(own_saved) | {"format": number}))
        with pytest.raises(RunError, match=f"has format {number}, but this version reads 2"):
            load(tmp_path)
    (tmp_path / RECIPE).write_text("{")
    with pytest.raises(RunError, match="can't be read"):
        load(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"no safetensors at all"])
def test_missing_or_broken_weights_are_one_line(own_saved: Path, tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / RECIPE).write_bytes((own_saved / RECIPE).read_bytes())
    if content is not None:
        (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(RunError, match=rf"{re.escape(WEIGHTS)} can't be read") as error:
        load(tmp_path, build=TinyResNet)
    assert one_line(error)


def test_weights_of_another_network_are_one_line(own_saved: Path, tmp_path: Path) -> None:
    (tmp_path / RECIPE).write_bytes((own_saved / RECIPE).read_bytes())
    save_file({"stem.weight": torch.zeros(5, 1, 3, 3)}, tmp_path / WEIGHTS)
    with pytest.raises(WeightsError, match="don't fit a TinyResNet: Missing key") as error:
        load(tmp_path, build=TinyResNet)
    assert one_line(error)


def test_an_unwritable_folder_is_one_line(own: Pruned, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't write to") as error:
        own.save(tmp_path / "file" / "pruned")
    assert one_line(error)


class Untraceable(nn.Module):
    """Its path depends on what it sees, which torch.export can't write down."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.fc = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        if features.mean() > 0:
            features = features * 2
        return self.fc(features.mean((2, 3)))  # type: ignore[no-any-return]


def test_without_a_program_the_rest_is_saved_with_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dense = seeded(Untraceable)
    kept = {"conv.weight": {0: torch.arange(4)}, "conv.bias": {0: torch.arange(4)}, "fc.weight": {1: torch.arange(4)}}
    model = cut(dense, Cut(kept))
    (tmp_path / PROGRAM).write_text("of an earlier save")
    with pytest.warns(AutopruneWarning, match=r"^no program\.pt2 was written: torch\.export can't trace") as caught:
        save(model, tmp_path, dense=dense, change=Cut(kept), example_input=inputs(1), measured={})
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert capfd.readouterr() == ("", "")  # torch.export has much to say about it
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([WEIGHTS, RECIPE])
    with torch.no_grad():
        assert torch.equal(load(tmp_path, build=Untraceable)(inputs(2)), model(inputs(2)))


# ---------------------------------------------------------------------------------------------------------------- ONNX


def onnx_runtime() -> Any:
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    pytest.importorskip("onnx", reason="needs the extra onnx")
    return pytest.importorskip("onnxruntime", reason="needs the extra onnx")


class Network(nn.Module):
    """A network whose forward pass is a function of its two layers."""

    def __init__(self, forward: Any, *arguments: str) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)
        self._forward, self._arguments = forward, arguments

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self.conv, self.fc, *args, *(kwargs[name] for name in self._arguments))


def network(forward: Any, *arguments: str) -> nn.Module:
    return seeded(lambda: Network(forward, *arguments))  # type: ignore[arg-type]


def test_onnx_computes_the_same_for_any_batch(own: Pruned, tmp_path: Path) -> None:
    runtime = onnx_runtime()
    own.model.train()
    path = to_onnx(own.model, tmp_path / "net.onnx", inputs(1))
    assert all(module.training for module in own.model.modules())
    assert path == tmp_path / "net.onnx"
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["input"]
    assert [given.name for given in session.get_outputs()] == ["output"]
    own.model.eval()
    for batch in (1, 3, 5):
        with torch.no_grad():
            expected = own.model(inputs(batch))
        (found,) = session.run(None, {"input": inputs(batch).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_onnx_of_several_inputs_and_outputs(tmp_path: Path) -> None:
    runtime = onnx_runtime()

    def forward(conv: nn.Module, fc: nn.Module, images: Tensor, scale: Tensor) -> dict[str, Tensor]:
        features = conv(images).mean((2, 3)) * scale
        return {"logits": fc(features), "features": features}

    example = {"images": inputs(2), "scale": torch.tensor(3.0)}
    model = network(forward, "images", "scale")
    session = runtime.InferenceSession(to_onnx(model, tmp_path / "net.onnx", example))
    assert {given.name for given in session.get_inputs()} == {"images", "scale"}
    more = {"images": inputs(7), "scale": torch.tensor(-2.0)}
    with torch.no_grad():
        expected = model(**more)
    found = session.run(["features", "logits"], {name: tensor.numpy() for name, tensor in more.items()})
    for name, output in zip(["features", "logits"], found, strict=True):
        torch.testing.assert_close(torch.from_numpy(output), expected[name], rtol=1e-4, atol=1e-5)


def test_onnx_of_a_tuple_with_a_plain_number(tmp_path: Path) -> None:
    runtime = onnx_runtime()
    model = network(lambda conv, fc, images, by: fc(conv(images).mean((2, 3)) * by))
    session = runtime.InferenceSession(to_onnx(model, tmp_path / "net.onnx", (inputs(1), 2.0)))
    assert [given.name for given in session.get_inputs()] == ["input_0"]


def test_onnx_keeps_the_examples_batch_where_no_other_works(tmp_path: Path) -> None:
    runtime = onnx_runtime()
    model = network(lambda conv, fc, images: fc(conv(images).reshape(2, 8, 36).mean(2)))
    with pytest.warns(AutopruneWarning, match=r"net\.onnx takes a batch of 2 only: ") as caught:
        path = to_onnx(model, tmp_path / "net.onnx", inputs(2))
    assert "\n" not in str(caught[0].message)
    assert runtime.InferenceSession(path).get_inputs()[0].shape == [2, 1, 8, 8]


def test_a_branch_on_values_is_not_written_as_it_happened_to_go(tmp_path: Path) -> None:
    onnx_runtime()
    with pytest.raises(RunError, match="the Untraceable can't be written as ONNX: ") as error:
        to_onnx(seeded(Untraceable), tmp_path / "net.onnx", inputs(1))
    assert one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_runtime()
    real = torch.onnx.export

    def wrong(model: nn.Module, *args: Any, **options: Any) -> None:
        broken = copy.deepcopy(model)
        with torch.no_grad():
            next(broken.parameters()).mul_(1.01)
        real(broken, *args, **options)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(RunError, match=r"differs by \d\.\de-\d\d; nothing was written"):
        to_onnx(seeded(TinyNet), tmp_path / "net.onnx", inputs(1))
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_packages_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with pytest.raises(ConfigError, match=r'pip install "autoprune\[onnx\]"') as error:
        to_onnx(seeded(TinyNet), tmp_path / "net.onnx", inputs(1))
    assert one_line(error)
