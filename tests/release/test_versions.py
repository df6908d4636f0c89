"""What runs the suite on several versions of torch: environments and the table."""

import pytest

from release import versions

PAGE = f"Before.\n\n{versions.HEAD}| 2.6.0 | old |\n| 2.13.0 | old |\n\nAfter.\n"


@pytest.fixture
def commands(monkeypatch, tmp_path) -> list[list[str]]:
    """The commands that would be run."""
    run: list[list[str]] = []
    monkeypatch.setattr(versions, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(
        versions.subprocess, "run", lambda command, **_: run.append([*map(str, command)])
    )
    return run


def test_an_interrupted_install_is_begun_again(commands, monkeypatch, tmp_path):
    """The interpreter is there first, the packages that it needs may not be."""
    monkeypatch.setattr(versions, "install", lambda *_: 1 / 0)
    (tmp_path / "2.6.0/bin").mkdir(parents=True)
    (tmp_path / "2.6.0/bin/python").touch()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            versions.environment("2.6.0")
    assert ["--clear" in command for command in commands] == [True, True]


def test_a_whole_environment_is_kept(commands, tmp_path):
    (tmp_path / "2.6.0").mkdir()  # as venv leaves it
    python = versions.environment("2.6.0")
    made = len(commands)
    assert any("torch==2.6.0" in command for command in commands)
    assert versions.environment("2.6.0") == python
    assert len(commands) == made


@pytest.mark.parametrize(
    ("summary", "counts"),
    [
        ("8055 passed, 1208 skipped in 61.00s", ("8055", "1208", "0")),
        ("2 failed, 7 passed, 1 skipped, 3 warnings, 1 error in 6s", ("7", "1", "3")),
        ("1 passed, 2 errors in 0.1s", ("1", "0", "2")),
        ("Fatal Python error: Segmentation fault", ("?", "?", "?")),
    ],
)
def test_a_summary_is_counted(summary, counts):
    """A test that met an error in a fixture has failed."""
    assert versions.counts(summary) == counts


def test_a_row_replaces_that_of_its_version_alone():
    page = versions.with_rows(PAGE, {"2.13.0": "| 2.13.0 | new |\n", "2.9.1": "| 2.9.1 | new |\n"})
    rows = "| 2.6.0 | old |\n| 2.9.1 | new |\n| 2.13.0 | new |\n"
    assert page == f"Before.\n\n{versions.HEAD}{rows}\nAfter.\n"


def test_the_page_has_the_table():
    assert versions.TABLE.search(versions.PAGE.read_text())
