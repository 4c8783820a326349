import contextlib

import pytest
import torch

from autoprune.seeds import derive, seeded_torch


class TestDerive:
    def test_it_is_the_same_in_every_process_and_version(self):
        assert (derive(0), derive(7, "agent", 3)) == (804681139, 278201156)

    def test_names_and_seeds_part(self):
        assert len({derive(0), derive(1), derive(0, "a"), derive(0, "b"), derive(0, "a", "b"), derive(0, "a", 1)}) == 6

    def test_every_generator_takes_it(self):
        assert all(0 <= derive(seed, "x") < 2**31 for seed in range(200))


class TestSeededTorch:
    def test_it_repeats(self):
        draws = []
        for _ in range(2):
            with seeded_torch(3):
                draws.append(torch.rand(4))
        assert torch.equal(*draws)

    def test_seeds_differ(self):
        with seeded_torch(3):
            first = torch.rand(4)
        with seeded_torch(4):
            assert not torch.equal(first, torch.rand(4))

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_the_global_generator_is_restored(self):
        with seeded_torch(3):
            torch.rand(4)

    @pytest.mark.usefixtures("global_rng_untouched")
    def test_it_is_restored_after_an_error(self):
        with contextlib.suppress(ZeroDivisionError), seeded_torch(3):
            torch.rand(4)
            raise ZeroDivisionError
