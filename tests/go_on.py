"""`pytest --go-on`: leaves out what has passed since anything last changed. A run that ends well forgets it all.

What passes is noted at once, by the process that starts the others if there are some: so a run may be stopped anywhere.
"""

import hashlib
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--go-on", action="store_true", help="leave out what has passed since anything last changed")


def pytest_configure(config):
    if config.getoption("go_on"):
        config.pluginmanager.register(GoOn(config.rootpath, getattr(config, "workerinput", None)))


def state_of(root: Path) -> str:
    """A hash of a project's files, of Python and of what is installed."""
    state = hashlib.sha256(f"{sys.version} {sorted(f'{d.name} {d.version}' for d in distributions())}".encode())
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        made = parts[0] in ("build", "dist", "runs") or any(p.startswith((".", "__pyc")) for p in parts)
        if path.is_file() and not made:
            state.update(f"{parts}".encode() + path.read_bytes())
    return state.hexdigest()


class GoOn:
    def __init__(self, root: Path, given: dict | None):
        self.file, self.starts, self.called = root / ".pytest_cache" / "passed.txt", given is None, set()
        if given is None:
            self.noted, state = self.file.read_text().splitlines() if self.file.exists() else [], state_of(root)
            if self.noted[:1] != [state]:
                self.noted = [state]
                self.file.parent.mkdir(exist_ok=True)
                self.file.write_text(f"{state}\n")
        else:
            self.noted = given["noted"]

    @pytest.hookimpl(optionalhook=True)  # of pytest-xdist
    def pytest_configure_node(self, node):
        node.workerinput["noted"] = self.noted

    def pytest_collection_modifyitems(self, config, items):
        passed = set(self.noted)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.called.add(report.nodeid)
        elif self.starts and report.when == "teardown" and report.passed and report.nodeid in self.called:
            with self.file.open("a") as file:
                file.write(f"{report.nodeid}\n")

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and len(self.noted) > 1:  # none were left
            session.exitstatus = exitstatus = 0
        if self.starts and exitstatus == 0:
            self.file.unlink()
