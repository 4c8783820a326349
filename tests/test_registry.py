import importlib
from importlib.metadata import EntryPoint

import pytest

from autoprune import registry
from autoprune.errors import ConfigError, UnknownNameError
from autoprune.scoring.l1 import L1


@pytest.fixture
def installed(monkeypatch):
    """Pretend that another package offers these entry points: a list to fill."""
    points: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: [point for point in points if point.group == group])
    return points


class TestOwnMembers:
    @pytest.mark.parametrize("family", registry.FAMILIES)
    def test_every_name_is_something_that_can_be_called(self, family):
        assert all(callable(registry.resolve(family, name)) for name in registry.names(family))

    def test_a_name_is_its_class(self):
        assert registry.resolve("criterion", "l1") is L1

    def test_names_are_sorted(self):
        assert registry.names("criterion") == ["identity", "l1", "l2", "obs", "random", "taylor"]

    def test_listing_imports_nothing(self, monkeypatch):
        monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} is imported"))
        for family in registry.FAMILIES:
            registry.names(family)

    def test_an_unknown_name_gets_the_nearest(self):
        message = r"no criterion 'taylr'. Did you mean 'taylor'\? Known: identity, l1, l2"
        with pytest.raises(UnknownNameError, match=message):
            registry.resolve("criterion", "taylr")


class TestMembersOfOthers:
    def test_one_is_found(self, installed):
        installed.append(EntryPoint("mine", "autoprune.scoring.l1:L1", "autoprune.scoring"))
        assert "mine" in registry.names("criterion")
        assert registry.resolve("criterion", "mine") is L1

    def test_another_family_does_not_see_it(self, installed):
        installed.append(EntryPoint("mine", "autoprune.scoring.l1:L1", "autoprune.scoring"))
        assert "mine" not in registry.names("agent")

    def test_it_can_not_take_a_name_that_is_taken(self, installed):
        installed.append(EntryPoint("l1", "other:L1", "autoprune.scoring"))
        with pytest.raises(
            ConfigError, match=r"criterion 'l1' is defined twice: autoprune\.scoring\.l1:L1 and other:L1"
        ):
            registry.resolve("criterion", "l1")
