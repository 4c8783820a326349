import re

import pytest

from autoprune import errors


def classes():
    return [getattr(errors, name) for name in errors.__all__]


def drawn_tree() -> dict[str, tuple[str | None, set[str]]]:
    """Return each class of the tree in the module's docstring with its parent, and the builtins beside it."""
    tree, path = {}, []
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│├└─ ]*)(\w+)(?: \((\w+)\))?(?:\s|$)", line)
        if match:
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            tree[match[2]] = (path[depth - 1] if depth else None, {match[3]} if match[3] else set())
    return tree


class TestTree:
    def test_the_drawing_names_every_class(self):
        assert set(drawn_tree()) == set(errors.__all__)

    @pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
    def test_the_drawing_is_what_is_inherited(self, cls):
        parent, builtins = drawn_tree()[cls.__name__]
        bases = {base.__name__ for base in cls.__bases__}
        assert bases == ({parent} | builtins if parent else bases & {"Exception", "UserWarning"})

    def test_every_class_says_what_it_means(self):
        assert [cls.__name__ for cls in classes() if not cls.__doc__] == []

    def test_a_caller_may_catch_the_builtin(self):
        with pytest.raises(ValueError, match="x"):
            raise errors.BudgetError("x")
        with pytest.raises(LookupError, match="x"):
            raise errors.UnknownNameError("agent", "x", ["y"])


class TestUnknownNameError:
    def test_it_names_the_nearest_and_lists_all(self):
        error = errors.UnknownNameError("agent", "tep", ["tpe", "amc", "random"])
        assert str(error) == "no agent 'tep'. Did you mean 'tpe'? Known: amc, random, tpe"

    def test_it_guesses_nothing_far_away(self):
        assert str(errors.UnknownNameError("agent", "xyz", ["tpe"])) == "no agent 'xyz'. Known: tpe"
