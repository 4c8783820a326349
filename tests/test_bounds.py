import pytest

from autoprune.bounds import parse_bounds, read_bounds
from autoprune.errors import ConfigError, UnknownNameError
from autoprune.structure import Group, LockedGroup, Structure


@pytest.fixture(scope="module")
def structure():
    names = ("conv1", "layer1.0", "layer1.1", "layer2.0")
    groups = tuple(Group(name, "channels", 8, (), (name,), ()) for name in names)
    return Structure(groups, (LockedGroup("fc", "channels", 10, ("fc",), "its elements are the network's output"),))


class TestReadBounds:
    def read(self, tmp_path, text):
        (tmp_path / "bounds.toml").write_text(text)
        return read_bounds(tmp_path / "bounds.toml")

    def test_it_returns_the_groups(self, tmp_path):
        text = '[groups]\nconv1 = {lock = true}\n"layer3.*" = {min = 0.2, max = 0.8}\n'
        assert self.read(tmp_path, text) == {"conv1": {"lock": True}, "layer3.*": {"min": 0.2, "max": 0.8}}

    def test_it_may_be_empty(self, tmp_path):
        assert self.read(tmp_path, "[groups]\n") == {}

    @pytest.mark.parametrize("text", ["", "conv1 = {lock = true}", "groups = 3", "[groups]\na = 0.5", "[groups]\n[x]"])
    def test_another_document_is_refused(self, tmp_path, text):
        with pytest.raises(ConfigError, match=r"must hold one table \[groups\], with lines such as conv1 = \{lock"):
            self.read(tmp_path, text)

    def test_what_is_not_toml_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=r"bounds\.toml is not TOML: "):
            self.read(tmp_path, "[groups\n")

    def test_what_is_not_text_is_refused(self, tmp_path):
        (tmp_path / "bounds.toml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match=r"bounds\.toml is not TOML: "):
            read_bounds(tmp_path / "bounds.toml")

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r"can't read the groups' bounds from .*none\.toml: No such file"):
            read_bounds(tmp_path / "none.toml")


class TestParseBounds:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ({}, (0.0, 0.9)),
            ({"min": 0.2}, (0.2, 0.9)),
            ({"max": 0.5}, (0.0, 0.5)),
            ({"min": 0.2, "max": 0.2}, (0.2, 0.2)),
            ({"min": 0.95}, (0.95, 0.95)),
            ({"max": 0.95}, (0.0, 0.95)),
            ({"lock": True}, (0.0, 0.0)),
            ({"lock": True, "min": 0.2}, (0.0, 0.0)),
            ({"lock": False, "max": 0.5}, (0.0, 0.5)),
            ({"min": 0, "max": 0}, (0.0, 0.0)),
        ],
    )
    def test_a_line(self, structure, line, expected):
        assert parse_bounds({"conv1": line}, structure, 0.9) == {"conv1": expected}

    def test_groups_that_are_not_named_are_left_out(self, structure):
        assert parse_bounds({}, structure, 0.9) == {}

    def test_wildcards(self, structure):
        assert set(parse_bounds({"layer1.*": {}}, structure, 0.9)) == {"layer1.0", "layer1.1"}
        assert set(parse_bounds({"layer?.0": {}}, structure, 0.9)) == {"layer1.0", "layer2.0"}
        assert set(parse_bounds({"*": {}}, structure, 0.9)) == set(structure.names)

    def test_a_later_line_wins(self, structure):
        table = {"layer1.*": {"max": 0.5}, "layer1.1": {"lock": True}}
        assert parse_bounds(table, structure, 0.9) == {"layer1.0": (0.0, 0.5), "layer1.1": (0.0, 0.0)}

    def test_an_unknown_group_gets_the_nearest(self, structure):
        with pytest.raises(UnknownNameError, match=r"no group 'conv2'. Did you mean 'conv1'\? Known: conv1, layer1\.0"):
            parse_bounds({"conv2": {}}, structure, 0.9)

    def test_a_group_that_can_not_be_pruned_is_told_why(self, structure):
        with pytest.raises(ConfigError, match=r"group 'fc' can't be pruned, .*: its elements are the network's output"):
            parse_bounds({"fc": {"max": 0.5}}, structure, 0.9)

    def test_an_unknown_key_is_refused(self, structure):
        with pytest.raises(ConfigError, match="group 'conv1' has a key 'keep'; known are lock, min and max"):
            parse_bounds({"conv1": {"keep": 0.5, "max": 0.5}}, structure, 0.9)

    @pytest.mark.parametrize(
        "line",
        [
            {"max": 1.0},
            {"max": 1},
            {"min": -0.1},
            {"min": 0.6, "max": 0.5},
            {"max": float("nan")},
            {"min": float("nan")},
            {"min": "0.2"},
            {"max": "0.2"},
            {"max": True},
            {"min": [0.1]},
            {"lock": True, "max": 3},
        ],
    )
    def test_numbers_out_of_range_are_refused(self, structure, line):
        with pytest.raises(ConfigError, match="`0 <= min <= max < 1` must hold for group 'conv1', but got min="):
            parse_bounds({"conv1": line}, structure, 0.9)

    @pytest.mark.parametrize("lock", ["no", 1, 0.0])
    def test_a_lock_is_true_or_false(self, structure, lock):
        with pytest.raises(ConfigError, match="`lock` must be true or false for group 'conv1', but got"):
            parse_bounds({"conv1": {"lock": lock}}, structure, 0.9)
