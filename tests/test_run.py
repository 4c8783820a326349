"""The run folder: files that are whole or not there, and folders that belong to one search."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoprune.errors import RunError
from autoprune.run import RunFolder, write_json

CONFIG: dict[str, Any] = {
    "format": 1,
    "digest": {"network": "abc", "data": "def"},
    "search": {"budget": "macs<=50%", "seed": 0, "sensitivity": (0.25, 0.5), "bounds": {"conv1": {"lock": True}}},
    "versions": {"torch": "2.15"},
}
IDENTITY = ("digest", "search")


def one_line(error: pytest.ExceptionInfo[Any]) -> bool:
    return "\n" not in str(error.value)


def changed(section: str, **values: object) -> dict[str, Any]:
    return CONFIG | {section: CONFIG[section] | values}


# --------------------------------------------------------------------------------------------------------------- files


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"text": "\N{GREEK SMALL LETTER TAU}", "number": 0.1})
    before = path.read_bytes()
    assert json.loads(before) == {"text": "\N{GREEK SMALL LETTER TAU}", "number": 0.1}
    assert before.endswith(b"}\n")

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"number": 2})
    assert path.read_bytes() == before


def test_what_is_no_json_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"number": 1})
    with pytest.raises(TypeError):
        write_json(path, {"number": object()})
    assert json.loads(path.read_text()) == {"number": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_files_have_the_names_that_the_format_gives(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    names = [folder.config, folder.sensitivity, folder.ledger, folder.front, folder.result, folder.final, folder.report]
    assert [file.name for file in names] == [
        *("config.json", "sensitivity.json", "ledger.jsonl", "front.json", "result.json", "final.json", "report.html")
    ]
    assert folder.pruned == tmp_path / "pruned"


# ------------------------------------------------------------------------------------------------------------- folders


def test_create_makes_all_folders_on_the_way_and_leaves_nothing_in_them(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    folder.create()
    folder.create()
    assert list(folder.path.iterdir()) == []


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "run"


def a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


def a_read_only_system_folder(tmp_path: Path) -> Path:
    return Path("/proc/run")


@pytest.mark.parametrize("make", [below_a_file, a_file, a_read_only_system_folder])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    with pytest.raises(RunError, match=rf"^can't write to {path}: .+; name another folder with --out$") as error:
        RunFolder(path).create()
    assert one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(RunError, match="Permission denied"):
        RunFolder(tmp_path / "run").create()


# -------------------------------------------------------------------------------------------------------------- claims


def test_a_new_folder_is_taken_and_the_same_search_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.claim(CONFIG, IDENTITY) is False
    assert folder.read(folder.config) == json.loads(json.dumps(CONFIG))
    folder.ledger.write_text("")
    assert folder.claim(CONFIG, IDENTITY) is True
    assert folder.claim(changed("versions", torch="9.9"), IDENTITY) is True  # no part of what a search is
    assert folder.read(folder.config)["versions"] == {"torch": "2.15"}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("search", "seed", 1),
        ("search", "budget", None),
        ("search", "sensitivity", (0.5,)),
        ("search", "bounds", {}),
        ("search", "new", 3),
        ("digest", "data", "xyz"),
    ],
)
@pytest.mark.parametrize("left", ["ledger", "sensitivity", "tracking", "result"])
def test_another_search_is_refused_and_the_difference_named(
    tmp_path: Path, section: str, key: str, value: object, left: str
) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG, IDENTITY)
    getattr(folder, left).write_text("")
    before = folder.config.read_bytes()
    with pytest.raises(RunError, match=rf"holds another search: its {key} is .*, not .*; name another folder") as error:
        folder.claim(changed(section, **{key: value}), IDENTITY)
    assert one_line(error)
    assert folder.config.read_bytes() == before


def test_a_key_that_is_gone_makes_another_search(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG, IDENTITY)
    folder.ledger.write_text("")
    without = CONFIG | {"search": {k: v for k, v in CONFIG["search"].items() if k != "seed"}}
    with pytest.raises(RunError, match="its seed is 0, not None"):
        folder.claim(without, IDENTITY)


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG, IDENTITY)
    folder.ledger.write_text("")
    with pytest.raises(RunError, match="its format is 1, not 2, which is another version of autoprune; name another"):
        folder.claim(CONFIG | {"format": 2}, IDENTITY)


def test_a_folder_whose_search_left_nothing_is_free(tmp_path: Path) -> None:
    """A search that fails before it begins, for its budget, say, must not block its folder for the corrected one."""
    folder = RunFolder(tmp_path)
    folder.claim(CONFIG, IDENTITY)
    other = changed("search", budget="macs<=70%")
    assert folder.claim(other, IDENTITY) is False
    assert folder.read(folder.config) == json.loads(json.dumps(other))


def test_a_ledger_without_its_config_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.ledger.write_text("")
    with pytest.raises(RunError, match="holds a ledger without its config"):
        folder.claim(CONFIG, IDENTITY)


def test_a_file_that_is_missing_or_broken_is_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(RunError, match=r"has no result\.json; is it the --out folder of a finished search\?") as error:
        folder.read(folder.result)
    assert one_line(error)
    for content in (b'{"half": ', b"\xff\xfe"):
        folder.result.write_bytes(content)
        with pytest.raises(RunError, match=r"result\.json can't be read") as error:
            folder.read(folder.result)
        assert one_line(error)
