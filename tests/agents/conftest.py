"""What several tests of Optuna's agents use."""

import pytest
from optuna.samplers import RandomSampler


class Stubborn(RandomSampler):
    """Asks for one and the same point, whatever it is told."""

    def sample_independent(self, study: object, trial: object, name: str, distribution: object) -> float:
        return 0.5


@pytest.fixture
def stubborn() -> Stubborn:
    """A sampler that repeats itself."""
    return Stubborn(seed=0)
