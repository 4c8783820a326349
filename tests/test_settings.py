"""What a search can be told: checked when it is said, and the same on its way to JSON and back."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.errors import BudgetError, ConfigError, UnknownNameError
from autoprune.evaluation import Recovery
from autoprune.finetuning import Recipe
from autoprune.settings import SearchSettings


def test_the_defaults_are_valid_and_of_the_documented_size() -> None:
    settings = SearchSettings()
    assert (settings.agent, settings.candidates, settings.control_size, settings.limits.limits) == (
        "surrogate",
        60,
        6,
        (),
    )
    assert settings.recovery == Recovery(2000, 0, Recipe(lr=0.01))
    assert settings.measured_with == {
        "criterion": "l1",
        "recover": "reconstructed",
        "calibration_images": 2000,
        "seed": 0,
        "units": ["channels", "heads"],
        "multiple": 1,
        "normalised": False,
    }


@pytest.mark.parametrize(
    ("candidates", "control", "size"), [(60, None, 6), (5, None, 1), (19, None, 1), (60, 0, 0), (5, 9, 9)]
)
def test_the_control_is_a_tenth_unless_it_is_given(candidates: int, control: int | None, size: int) -> None:
    assert SearchSettings(candidates=candidates, control=control).control_size == size


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("candidates", 0),
        ("finetune_steps", -1),
        ("shared_steps", -1),
        ("calibration_images", 1),
        ("control", -1),
        ("max_drop", -0.01),
        ("max_drop", 1.0),
        ("max_drop", math.nan),
        ("max_sparsity", 0.0),
        ("max_sparsity", 1.0),
        ("promote", 0.0),
        ("promote", 0.6),
        ("promote", math.nan),
        ("lr", 0.0),
        ("lr", math.nan),
        ("time_limit", 0),
    ],
)
def test_values_out_of_range_are_refused_with_rule_and_value(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^`.*{name}.*` must hold, but got {name}={value}") as error:
        SearchSettings(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_promotion_needs_steps() -> None:
    with pytest.raises(ConfigError, match="`promote` says who is fine-tuned, but there are no steps"):
        SearchSettings(promote=0.25)
    with pytest.raises(ConfigError, match=r"0\.25 of 12 candidates are fewer than 4, too few to compare"):
        SearchSettings(promote=0.25, finetune_steps=50, candidates=12)
    assert SearchSettings(promote=0.25, finetune_steps=50).recovery.finetune_steps == 0
    assert SearchSettings(finetune_steps=50).recovery.finetune_steps == 50
    assert SearchSettings(promote="auto", finetune_steps=50).recovery.finetune_steps == 0
    with pytest.raises(ConfigError, match="there are no steps"):
        SearchSettings(promote="auto")
    with pytest.raises(ConfigError, match=r"15 candidates are too few to learn who to promote; .* to 16"):
        SearchSettings(promote="auto", finetune_steps=50, candidates=15)
    with pytest.raises(ConfigError, match=r'or `promote == "auto"` must hold, but got promote=\'some\''):
        SearchSettings(promote="some", finetune_steps=50)
    with pytest.raises(ConfigError, match='`promote` must be a number or "auto", but got None'):
        SearchSettings(promote=None)  # type: ignore[arg-type]


def test_cells_depend_on_what_shared_weights_depend_on() -> None:
    """And on nothing of it where there are none."""
    plain = SearchSettings(budget="macs<=50%", lr=0.02)
    assert plain.shared_with == {}
    assert plain.measured_with == SearchSettings().measured_with
    shared = SearchSettings(budget="macs<=50%", lr=0.02, shared_steps=100, bounds={"fc": {"lock": True}})
    assert shared.measured_with == plain.measured_with | {
        "shared_steps": 100,
        "lr": 0.02,
        "budget": "macs<=50%",
        "max_drop": None,
        "space": "group",
        "max_sparsity": 0.9,
        "bounds": {"fc": {"lock": True}},
    }
    assert json.loads(json.dumps(shared.measured_with)) == shared.measured_with
    assert shared.recipe == shared.recovery.recipe == Recipe(lr=0.02)


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ({"budget": "macs<=50%"}, True),
        ({"budget": "macs<=50%", "max_drop": 0.01}, False),
        ({"max_drop": 0.01}, False),
        ({}, False),
    ],
)
def test_whether_the_whole_budget_is_used(settings: dict[str, Any], whole: bool) -> None:
    assert SearchSettings(**settings).whole_budget == whole


@pytest.mark.parametrize("sparsities", [(0.0,), (0.5, 1.0), (math.nan,)])
def test_measured_sparsities_are_between_0_and_1(sparsities: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="`0 < sparsity < 1` must hold"):
        SearchSettings(sensitivity=sparsities)


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"space": "groups"}, "Did you mean 'group'"),
        ({"criterion": "tailor"}, "Did you mean 'taylor'"),
        ({"candidate": 3}, "Did you mean 'candidates'"),
    ],
)
def test_unknown_names_get_the_nearest(values: dict[str, Any], hint: str) -> None:
    with pytest.raises(UnknownNameError, match=hint):
        SearchSettings.of(values)


def test_a_budget_is_read_at_once_and_kept_in_one_spelling() -> None:
    assert SearchSettings(budget=" macs <= 0.5 , params<=20K").budget == "macs<=50%,params<=20K"
    assert SearchSettings(budget=None).budget is None
    with pytest.raises(BudgetError, match="can't read the budget"):
        SearchSettings(budget="half")


def test_json_and_back() -> None:
    settings = SearchSettings(
        budget="macs<=50%", max_drop=0.01, control=3, sensitivity=(0.5,), bounds={"conv1": {"lock": True}}, time_limit=9
    )
    written = json.loads(json.dumps(settings.to_dict()))
    assert "time_limit" not in written
    again = SearchSettings.of(written)
    assert again.to_dict() == settings.to_dict()
    assert (again.sensitivity, again.bounds, again.time_limit) == ((0.5,), {"conv1": {"lock": True}}, None)


@settings(max_examples=20)
@given(st.integers(1, 500), st.one_of(st.none(), st.integers(0, 50)))
def test_a_control_that_was_worked_out_stays_what_it_was(candidates: int, control: int | None) -> None:
    made = SearchSettings(candidates=candidates, control=control)
    assert SearchSettings.of(made.to_dict()).control_size == made.control_size


def test_bounds_are_the_settings_own_copy() -> None:
    table = {"conv1": {"max": 0.5}}
    settings = SearchSettings(bounds=table)
    table["conv1"]["max"] = 0.9
    assert settings.bounds == {"conv1": {"max": 0.5}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_drop", "1%"),
        ("candidates", "5"),
        ("candidates", True),
        ("shared_steps", 1.5),
        ("bounds", "bounds.toml"),
        ("budget", 0.5),
    ],
)
def test_a_value_of_another_type_is_one_line(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` must be") as error:
        SearchSettings.of({name: value})
    assert "\n" not in str(error.value)


def test_a_race_is_at_one_cost_and_of_what_is_not_fine_tuned() -> None:
    for wrong in ({"max_drop": 0.01}, {"budget": None}):
        with pytest.raises(ConfigError, match="`race` compares with uniform at the same cost"):
            SearchSettings(**({"race": True, "budget": "macs<=50%"} | wrong))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`race` saves measuring, which is little where"):
        SearchSettings(race=True, budget="macs<=50%", finetune_steps=50)
    assert SearchSettings(race=True, budget="macs<=50%", finetune_steps=50, promote=0.25).race


def test_a_protocol_has_a_name_and_a_reward_of_its_own() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'accuracy'"):
        SearchSettings(protocol="acuracy")
    with pytest.raises(ConfigError, match="protocol accuracy has a reward of its own; give it or max_drop"):
        SearchSettings(protocol="accuracy", max_drop=0.01)
    with pytest.raises(ConfigError, match="`race` compares with uniform at the same cost"):
        SearchSettings(protocol="accuracy", budget="macs<=50%", race=True)
