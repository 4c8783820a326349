import importlib
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Literal

import pytest

from autoprune import registry
from autoprune.errors import ConfigError, UnknownNameError
from autoprune.scoring.l1 import L1

if TYPE_CHECKING:
    from somewhere import Unknown


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


class Made:
    """What an agent of another package may be made with."""

    def __init__(
        self,
        *,
        rate: float = 1.0,
        mode: Literal["calm", "wild"] = "calm",
        limit: int | None = None,
        label: str = "",
        sizes: tuple[int, ...] = (),
        anything=None,
    ) -> None:
        if not rate > 0:
            raise ConfigError(f"`rate > 0` must hold, but got rate={rate}")
        self.given = (rate, mode, limit, label, sizes, anything)


class Typed:
    """Has an annotation that only a type checker can read."""

    def __init__(self, *, limit: "Unknown" = None) -> None:
        self.limit = limit


class TestSettingsInNames:
    @pytest.fixture(autouse=True)
    def members(self, installed, monkeypatch):
        there = {"made": Made, "typed": Typed}
        installed += [EntryPoint(name, f"elsewhere:{name}", "autoprune.agents") for name in there]
        own = registry.resolve
        monkeypatch.setattr(registry, "resolve", lambda family, name: there.get(name) or own(family, name))

    @pytest.mark.parametrize(
        ("text", "given"),
        [
            ("made", (1.0, "calm", None, "", (), None)),
            ("made:rate=2", (2, "calm", None, "", (), None)),
            ("made:rate=1e-3:mode=wild:limit=5", (0.001, "wild", 5, "", (), None)),
            (" made : label = two words : limit = null ", (1.0, "calm", None, "two words", (), None)),
            ('made:label="5":anything=true', (1.0, "calm", None, "5", (), True)),
            ("made:anything=[1]", (1.0, "calm", None, "", (), "[1]")),
        ],
    )
    def test_they_are_what_a_member_is_made_with(self, text, given):
        assert registry.make("agent", text).given == given

    def test_they_go_with_settings_of_any_kind(self):
        assert registry.make("agent", "made:limit=5", {"sizes": (1, 2)}).given == (1.0, "calm", 5, "", (1, 2), None)
        assert registry.make("agent", "made", {"limit": "as it is"}).given[2] == "as it is"

    def test_our_own_agents_take_them(self):
        assert registry.make("agent", "tpe:warm_start=false:startup=3").startup == 3
        assert registry.make("agent", "tpe:warm_start=false").warm_start is False
        evolution = registry.make("agent", "evolution:survivors=2:offspring=8")
        assert (evolution.survivors, evolution.offspring) == (2, 8)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("tpe:warm_start=maybe", "`warm_start` of the agent tpe must be bool, but got warm_start=maybe; settings"),
            ("tpe:warm_start=0", "must be bool, but got warm_start=0; settings"),
            ("tpe:startup=2.5", r"`startup` of the agent tpe must be int \| None, but got startup=2.5; settings"),
            ("tpe:storage=5", r"must be str \| .*None, but got storage=5; settings"),
            ("evolution:survivors=true", "must be int, but got survivors=true; settings"),
            ("made:label=5", "must be str, but got label=5; settings of the agent made: anything, label, limit, mode"),
            ("made:mode=mild", r"must be Literal\['calm', 'wild'\], but got mode=mild"),
            ("made:sizes=5", r"must be tuple\[int, ...\], but got sizes=5"),
            ("made:rate=fast", "must be float, but got rate=fast"),
            ("made:rate=-1", "`rate > 0` must hold, but got rate=-1; settings of the agent made: anything, label"),
        ],
    )
    def test_a_wrong_value_is_answered_with_what_can_be_set(self, text, said):
        with pytest.raises(ConfigError, match=said):
            registry.make("agent", text)

    def test_so_is_a_setting_that_is_not_there(self):
        with pytest.raises(
            UnknownNameError, match=r"agent tpe 'warmstart'. Did you mean 'warm_start'\? Known: startup, "
        ):
            registry.make("agent", "tpe:warmstart=false")
        with pytest.raises(UnknownNameError, match=r"no setting of the agent uniform 'step'. Known: none"):
            registry.make("agent", "uniform:step=1")
        with pytest.raises(UnknownNameError, match="no agent 'tpee'"):
            registry.make("agent", "tpee:startup=1")

    @pytest.mark.parametrize("text", ["tpe:", "tpe:startup", "tpe:startup=", "tpe:=5", "tpe:storage=sqlite:///t.db"])
    def test_what_can_not_be_read_is_answered_with_how_it_is_written(self, text):
        for use in (registry.make, registry.spelt):
            with pytest.raises(ConfigError, match="settings are written as in evolution:survivors=2:offspring=8"):
                use("agent", text)

    def test_no_setting_is_given_twice(self):
        with pytest.raises(ConfigError, match="`startup` is given twice in the agent 'tpe:startup=1:startup=2'"):
            registry.make("agent", "tpe:startup=1:startup=2")
        with pytest.raises(ConfigError, match="`startup` of the agent tpe is given twice: in its name and beside it"):
            registry.make("agent", "tpe:startup=1", {"startup": 1})

    def test_where_no_annotation_can_be_read_any_value_does(self):
        assert registry.make("agent", "typed:limit=much").limit == "much"

    @pytest.mark.parametrize(
        ("text", "spelt"),
        [
            ("tpe", "tpe"),
            ("evolution:survivors=2:offspring=8", "evolution:offspring=8:survivors=2"),
            (" amc: sigma = 5e-1 :order=reverse", "amc:order=reverse:sigma=0.5"),
            ('made:label="5":anything=null', 'made:anything=null:label="5"'),
            ('made:label="word"', "made:label=word"),
        ],
    )
    def test_a_name_has_one_spelling(self, text, spelt):
        assert registry.spelt("agent", text) == spelt == registry.spelt("agent", spelt)
