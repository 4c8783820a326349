import copy

import pytest
import torch
from torch import nn

from autoprune.cost.latency import Latency
from autoprune.cost.sparse import SparseSpeed, compare_sparse, sparse_execution
from autoprune.errors import ConfigError, UnknownNameError

NAMES = ["0.weight", "2.weight"]


def blocky(tile=4):
    """Return a network with half of the blocks of its weights at zero, and the same without masks."""
    dense = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8, bias=False))
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        for module in (masked[0], masked[2]):
            blocks = torch.arange(module.weight.numel() // tile**2).reshape(module.weight.shape[0] // tile, -1) % 2
            module.weight.mul_(blocks.repeat_interleave(tile, 0).repeat_interleave(tile, 1))
    return dense, masked


def needs_bsr():
    """Skip where torch has no kernels for blocks, as in builds without MKL."""
    if not torch.backends.mkl.is_available():
        pytest.skip("torch was built without MKL, whose kernels multiply blocks on the CPU")


class TestBlocks:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16)])
    def test_the_output_is_the_dense_one(self, dtype, shape):
        needs_bsr()
        masked = blocky()[1].to(dtype)
        sparse = sparse_execution(masked, NAMES, "bsr", (4, 4))
        x = torch.randn(shape, dtype=dtype)
        assert torch.allclose(sparse(x), masked(x), rtol=1e-5, atol=1e-6)

    def test_only_blocks_that_are_not_zero_are_stored(self):
        needs_bsr()
        masked = blocky()[1]
        weight = sparse_execution(masked, NAMES, "bsr", (4, 4))[0].weight
        assert weight.layout == torch.sparse_bsr
        assert weight.values().shape == (4 * 6 // 2, 4, 4)

    def test_the_masked_network_stays_as_it_is(self):
        needs_bsr()
        masked = blocky()[1]
        before = {name: (id(tensor), tensor.clone()) for name, tensor in masked.named_parameters()}
        sparse = sparse_execution(masked, ["0.weight"], "bsr", (4, 4)).eval()
        after = dict(masked.named_parameters())
        assert all(id(after[name]) == kept and torch.equal(after[name], old) for name, (kept, old) in before.items())
        assert masked.training
        assert sparse[2].weight.layout == torch.strided
        assert sparse[2].weight is not masked[2].weight

    def test_blocks_that_do_not_fit(self):
        with pytest.raises(
            ConfigError, match=r"'0.weight' of shape \(24, 16\) is not made of 5x4 blocks; choose others"
        ):
            sparse_execution(blocky()[1], NAMES, "bsr", (5, 4))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="kernels differ between devices")
    @pytest.mark.parametrize(("dtype", "tile"), [(torch.bfloat16, (4, 4)), (torch.float32, (8, 4))])
    def test_what_torch_has_no_kernel_for(self, dtype, tile):
        needs_bsr()
        message = rf"torch has no kernel on cpu for '0.weight' \({str(dtype)[6:]}, \(24, 16\)\) as {tile[0]}x4 blocks: "
        with pytest.raises(ConfigError, match=message):
            sparse_execution(blocky()[1].to(dtype), NAMES, "bsr", tile)


class TestSemiStructured:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device may have kernels")
    def test_a_device_without_kernels_is_refused(self):
        message = r"2:4 runs sparse on CUDA devices of compute capability 8.0 or higher only, but '0.weight' is on cpu"
        with pytest.raises(ConfigError, match=message):
            sparse_execution(blocky()[1], NAMES)

    @pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs a CUDA device of compute capability 8.0",
    )
    def test_the_output_is_the_dense_one(self):
        net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).cuda().half().eval()
        with pytest.raises(
            ConfigError, match=r"'0.weight' is not 2:4: of some 4 neighbours along its inputs more than 2"
        ):
            sparse_execution(net, NAMES)
        with torch.no_grad():
            for module in (net[0], net[2]):
                module.weight.mul_(torch.tensor([1, 0, 0, 1], device="cuda").repeat(module.weight.shape[1] // 4))
        x = torch.randn(64, 128, device="cuda").half()
        with torch.inference_mode():
            assert torch.allclose(sparse_execution(net, NAMES)(x), net(x), rtol=1e-2, atol=1e-2)


class TestRefused:
    def test_an_unknown_form(self):
        with pytest.raises(UnknownNameError, match=r"no sparse form 'bsd'. Did you mean 'bsr'\? Known: 2:4, bsr"):
            sparse_execution(blocky()[1], NAMES, "bsd")

    @pytest.mark.parametrize("name", ["0.bias", "1.weight", "missing.weight", "weight"])
    def test_what_is_no_linear_weight(self, name):
        with pytest.raises(ConfigError, match=rf"not '{name}'; there are 0.weight, 2.weight"):
            sparse_execution(blocky()[1], [name], "bsr", (4, 4))


def latency(median, spread=0.2):
    return Latency(median, spread, 9, "cpu: any", 1, "eager", 1)


class TestSpeed:
    def test_all_three_are_measured(self):
        needs_bsr()
        dense, masked = blocky()
        speed = compare_sparse(dense, masked, NAMES, torch.ones(3, 16), form="bsr", tile=(4, 4), warmup=1, repeats=4)
        assert (speed.form, speed.dense.repeats, speed.masked.repeats, speed.sparse.repeats) == ("bsr", 4, 4, 4)
        assert speed.speedup > 0

    @pytest.mark.parametrize(
        ("masked", "sparse", "helped"), [(4, 2, True), (4, 3.81, False), (4, 3.79, True), (4, 5, False)]
    )
    def test_it_helped_if_it_is_faster_by_more_than_the_spread(self, masked, sparse, helped):
        speed = SparseSpeed("2:4", latency(4.0), latency(masked), latency(sparse))
        assert speed.helped is helped
        assert speed.speedup == masked / sparse

    def test_its_text(self):
        texts = [str(SparseSpeed("2:4", latency(4.1), latency(4.0), latency(sparse))) for sparse in (2.0, 3.9)]
        assert texts == [
            "dense 4.1 ms ± 0.1, masked 4 ms ± 0.1, as 2:4 2 ms ± 0.1: 2.00 times as fast",
            "dense 4.1 ms ± 0.1, masked 4 ms ± 0.1, as 2:4 3.9 ms ± 0.1: no speed-up",
        ]

    def test_by_name(self):
        values = SparseSpeed("bsr", latency(4.0), latency(4.0), latency(2.0)).to_dict()
        assert (values["speedup"], values["helped"], values["masked"]["median_ms"]) == (2.0, True, 4.0)
