"""The marker `setting`: a test that shows that a setting matters, and how it is held to that.

`@pytest.mark.setting("worker.buffer_size")` stands on a test that gives the setting another value than its default and
asserts on what that changes. tests/test_settings.py wants one for every setting. `pytest --freeze-settings` proves the
claims: each such test runs with its setting frozen, that is, whatever the test gives, the product finds the default;
then it has to fail. The one of several rows that fails is enough.
"""

from __future__ import annotations

import ast
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lab import Node

from vpnd.api.channel import Channel
from vpnd.api.messages import Message
from vpnd.config import fields
from vpnd.config.schema import Config

TESTS = Path(__file__).parent
SETTINGS = {field.path: field for field in fields.all_settings()}


def claims() -> dict[str, list[str]]:
    """setting -> the tests marked with it, read from the syntax trees of all tests."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for decorator in node.decorator_list:
                    if (
                        isinstance(decorator, ast.Call)
                        and ast.unparse(decorator.func) == "pytest.mark.setting"
                    ):
                        for argument in decorator.args:
                            found[ast.literal_eval(argument)].append(
                                f"{path.relative_to(TESTS)}::{node.name}"
                            )
    return found


@contextlib.contextmanager
def frozen(path: str) -> Iterator[None]:
    """The product finds the default of this setting: in this process, in its children, and in the nodes of a lab."""
    field = SETTINGS[path]
    table, key, default = field.table, field.key, field.default
    struct: Any = fields.struct_of(table)
    send, write_config = Channel.send, Node.write_config

    def send_frozen(self: Channel, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        config = getattr(message, "config", None)
        if isinstance(config, Config):
            of_table = msgspec.structs.replace(getattr(config, table), **{key: default})
            message = msgspec.structs.replace(
                message, config=msgspec.structs.replace(config, **{table: of_table})
            )
        send(self, message, descriptors)

    def write_frozen(self: Node) -> None:
        given = self.config
        self.config = {**given, table: {k: v for k, v in given.get(table, {}).items() if k != key}}
        try:
            write_config(self)
        finally:
            self.config = given

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(struct, key, property(lambda self: default))
        patch.setattr(Channel, "send", send_frozen)
        patch.setattr(Node, "write_config", write_frozen)
        yield


# --- pytest


class Freezer:
    """The plugin behind --freeze-settings: only marked tests run, once for each of their settings, and must fail."""

    def __init__(self) -> None:
        self._failed: dict[tuple[str, str], bool] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        paths = [path for mark in metafunc.definition.iter_markers("setting") for path in mark.args]
        if paths:
            metafunc.fixturenames.append("frozen_setting")
            metafunc.parametrize("frozen_setting", paths, indirect=True)

    @pytest.fixture
    def frozen_setting(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if not _setting_of(item)])
        items[:] = [item for item in items if _setting_of(item)]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        with frozen(_setting_of(item)):
            yield

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        outcome: Any = yield
        report = outcome.get_result()
        if report.skipped:
            return
        test = item.nodeid.partition("[")[0], _setting_of(item)
        self._failed[test] = self._failed.get(test, False) or bool(report.failed)
        report.outcome, report.longrepr = "passed", None

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not all(self._failed.values()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for (test, path), failed in self._failed.items():
            if not failed:
                terminalreporter.line(f"{test} passes although {path} always is its default", red=True)


def _setting_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("frozen_setting", "")) if callspec is not None else ""
