"""`pytest --go-on`: a run that was stopped goes on, and starts anew where anything has changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import os
import pytest

@pytest.mark.parametrize("name", "abcde")
def test_name(name):
    with open(os.environ["RAN"], "a") as file:
        file.write(name)
    if name in os.environ["FAILS"]:
        raise KeyboardInterrupt if "stop" in os.environ["FAILS"] else AssertionError

@pytest.fixture
def left_untidy():
    yield
    assert "z" not in os.environ["FAILS"]

def test_z(left_untidy):
    test_name("z" if "z" not in os.environ["FAILS"] else "Z")
"""


@pytest.fixture(params=[[], ["-p", "xdist", "-n", "2"]], ids=["alone", "xdist"])
def run(request, tmp_path):
    """Runs a project of six tests, some of which fail: the exit status and the tests that ran."""
    project, ran = tmp_path / "project", tmp_path / "ran"
    project.mkdir()
    (project / "pytest.ini").write_text(f"[pytest]\npythonpath = {Path(__file__).parent}\n")
    (project / "conftest.py").write_text("from go_on import pytest_addoption, pytest_configure")
    (project / "test_names.py").write_text(TESTS)

    def run(fails="", changed=False):
        if changed:
            (project / "more.txt").write_text("changed")
        ran.write_text("")
        command = [sys.executable, "-m", "pytest", "--go-on", *request.param]
        env = os.environ | {"RAN": str(ran), "FAILS": fails, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
        return done.returncode, "".join(sorted(ran.read_text().lower()))

    return run


def test_what_passed_is_left_out_until_all_has(run):
    assert run(fails="bdz") == (1, "abcdez")
    assert run(fails="d") == (1, "bdz")  # of z only what cleans up had failed
    assert run() == (0, "d")
    assert run() == (0, "abcdez")


@pytest.mark.parametrize("run", [[]], indirect=True)
def test_a_change_anywhere_starts_anew(run):
    assert run(fails="b") == (1, "abcdez")
    assert run(changed=True) == (0, "abcdez")


@pytest.mark.parametrize("run", [[]], indirect=True)
def test_a_run_that_was_stopped_goes_on(run):
    assert run(fails="stop c") == (2, "abc")
    assert run(fails="stop e") == (2, "cde")
    assert run() == (0, "ez")
