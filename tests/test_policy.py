import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.errors import PolicyError
from autoprune.policy import Policy

SPARSITIES = st.dictionaries(st.text(max_size=8), st.floats(0, 1), max_size=6)


class TestMap:
    def test_it_reads_like_a_map(self):
        policy = Policy({"b": 0.5, "a": 0.25})
        assert dict(policy) == {"b": 0.5, "a": 0.25}
        assert list(policy) == ["b", "a"]
        assert (len(policy), policy["a"], policy.get("c", 0.0)) == (2, 0.25, 0.0)
        assert repr(policy) == "Policy({'b': 0.5, 'a': 0.25})"

    def test_it_does_not_follow_the_map_it_was_made_of(self):
        given_map = {"a": 0.25}
        policy = Policy(given_map)
        given_map["a"] = 0.75
        assert policy["a"] == 0.25

    def test_it_can_not_be_changed(self):
        policy = Policy({"a": 0.25})
        with pytest.raises(TypeError):
            policy["a"] = 0.5
        with pytest.raises(AttributeError):
            policy.sparsities = {}
        with pytest.raises(AttributeError):
            policy.id = "other"

    def test_numbers_of_numpy_become_floats(self):
        policy = Policy({"a": np.float32(0.5), "b": np.int64(0)})
        assert {type(value) for value in policy.values()} == {float}

    @given(SPARSITIES)
    def test_order_does_not_matter(self, sparsities):
        turned = dict(reversed(sparsities.items()))
        assert Policy(sparsities) == Policy(turned)
        assert Policy(sparsities).id == Policy(turned).id
        assert len({Policy(sparsities), Policy(turned)}) == 1

    def test_other_sparsities_are_another_policy(self):
        policies = [Policy({}), Policy({"a": 0.5}), Policy({"a": 0.25}), Policy({"b": 0.5})]
        assert len(set(policies)) == len({policy.id for policy in policies}) == 4

    @given(SPARSITIES)
    def test_copies_are_equal(self, sparsities):
        policy = Policy(sparsities)
        for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
            assert (other, other.id) == (policy, policy.id)

    def test_minus_zero_is_zero(self):
        assert Policy({"a": -0.0}) == Policy({"a": 0.0})
        assert Policy({"a": -0.0}).id == Policy({"a": 0.0}).id
        assert hash(Policy({"a": -0.0})) == hash(Policy({"a": 0.0}))


class TestEnds:
    @pytest.mark.parametrize("sparsity", [0, 0.0, 1, 1.0, np.float64(1)])
    def test_they_are_sparsities_too(self, sparsity):
        assert Policy({"layer1.0": sparsity})["layer1.0"] == float(sparsity)

    def test_what_vanishes_is_told_from_what_almost_does(self):
        assert Policy({"layer1.0": 1.0}).id != Policy({"layer1.0": 0.999999}).id


class TestRefused:
    @pytest.mark.parametrize(
        "sparsity", [1.5, 1 + 1e-15, -0.1, -1e-300, float("nan"), float("inf"), float("-inf"), 10**400]
    )
    def test_numbers_outside_of_zero_to_one(self, sparsity):
        with pytest.raises(PolicyError, match=r"`0 <= sparsity <= 1` must hold for every group, but got conv1="):
            Policy({"conv1": sparsity})

    @pytest.mark.parametrize("sparsity", ["0.5", None, [0.5], "half"])
    def test_what_is_no_number(self, sparsity):
        with pytest.raises(PolicyError, match="must hold for every group, but got conv1="):
            Policy({"conv1": sparsity})

    def test_the_message_is_one_line(self):
        with pytest.raises(PolicyError) as caught:
            Policy({"conv1": 1.5})
        assert "\n" not in str(caught.value)


class TestJson:
    @given(SPARSITIES)
    def test_there_and_back(self, sparsities):
        policy = Policy(sparsities)
        other = Policy.from_json(policy.to_json())
        assert (other, other.id, list(other)) == (policy, policy.id, list(policy))

    @pytest.mark.parametrize("text", ["", "{", "[1]", "3", '"text"', "null", "[[0.5]]"])
    def test_other_text_is_refused(self, text):
        with pytest.raises(PolicyError, match="a policy is a JSON object of groups and sparsities"):
            Policy.from_json(text)

    @pytest.mark.parametrize("value", ["1.5", "NaN", "Infinity", "-0.5", "null", '"0.5"', "{}", "[]"])
    def test_other_values_are_refused(self, value):
        with pytest.raises(PolicyError, match="`0 <= sparsity <= 1` must hold"):
            Policy.from_json(f'{{"conv1": {value}}}')

    @pytest.mark.parametrize("second", [0.75, 0.5])
    def test_conflicting_sparsities_can_not_be_expressed(self, second):
        with pytest.raises(PolicyError, match="gives each group one sparsity, but 'conv1' is named twice"):
            Policy.from_json(f'{{"conv1": 0.5, "conv2": 0.5, "conv1": {second}}}')

    def test_it_is_plain_json(self):
        assert json.loads(Policy({"conv1": 0.5}).to_json()) == {"conv1": 0.5}


class TestId:
    def test_it_is_the_same_in_every_process(self):
        code = "from autoprune.policy import Policy; print(Policy({'b': 0.3, 'a': 0.1}).id)"
        env = {"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(path for path in sys.path if path)}
        run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env)
        assert run.stdout == Policy({"a": 0.1, "b": 0.3}).id + "\n"

    def test_it_is_the_same_in_every_version(self):
        assert Policy({"conv1": 0.5, "conv2": 0.0}).id == "ced50eef7b41"

    def test_it_overlooks_what_arithmetic_leaves_behind(self):
        assert Policy({"a": 0.1 + 0.2}).id == Policy({"a": 0.3}).id
        assert Policy({"a": 0.3 + 1e-6}).id != Policy({"a": 0.3}).id
