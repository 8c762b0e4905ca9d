"""What others say cannot forge lines of the log, or move the terminal it is read on."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_daemon import daemon

from vpnd import logs
from vpnd.config.schema import Log
from vpnd.errors import MachineError


def test_a_message_is_one_line_of_what_can_be_printed() -> None:
    level = logging.getLogger().level
    handler = logs.configure(Log(), "control")
    assert isinstance(handler, logging.StreamHandler)
    stream = io.StringIO()
    handler.setStream(stream)
    record = logging.LogRecord(
        "test", logging.WARNING, "", 0, "a peer said %s", ("x\n2026 info forged\x1b[2J",), None
    )
    try:
        handler.handle(record)
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(level)
        for package in logs.OWN_PACKAGES:
            logging.getLogger(package).setLevel(logging.NOTSET)
    assert stream.getvalue().endswith("a peer said x\\u000a2026 info forged\\u001b[2J\n")
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_the_level_is_of_our_own_lines_and_libraries_tell_no_more_than_warnings(level: str) -> None:
    names = ("", "pyroute2.netlink", *logs.OWN_PACKAGES)
    before = {name: logging.getLogger(name).level for name in names}
    try:
        logs.set_level(level)
        least = logging.getLevelNamesMapping()[level.upper()]
        for name in logs.OWN_PACKAGES:
            assert logging.getLogger(f"{name}.module").getEffectiveLevel() == least
        for name in ("", "pyroute2.netlink.core", "asyncio"):
            assert logging.getLogger(name).getEffectiveLevel() == max(least, logging.WARNING)
    finally:
        for name, number in before.items():
            logging.getLogger(name).setLevel(number)


SCRIPT = """
import logging, sys
from vpnd import logs
from vpnd.config.schema import Log
from vpnd.errors import MachineError
logs.configure(Log(format=sys.argv[1]), "shard 2")
logging.getLogger("vpnd").info("session %s with b is up", "1f")
try:
    raise ValueError("x\\ny")
except ValueError:
    logging.getLogger().exception('it "broke"')
"""


def logged(form: str, *, journal: bool = False) -> list[str]:
    """What a process prints on its standard error."""
    ours, theirs = os.pipe()
    found = os.fstat(theirs)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if journal:
        environment["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
    subprocess.run([sys.executable, "-c", SCRIPT, form], stderr=theirs, check=True, env=environment)
    os.close(theirs)
    with open(ours) as stream:
        return stream.read().splitlines()


@pytest.mark.setting("log.format")
@pytest.mark.parametrize("form", ["logfmt", "json"])
def test_an_event_is_a_line_of_names_and_values(form: str) -> None:
    first, second = map(parsed if form == "logfmt" else json.loads, logged(form))
    assert (first["level"], first["process"]) == ("info", "shard 2")
    assert first["message"] == "session 1f with b is up" and first["time"][10] == "T"
    assert second["message"] == 'it "broke"' and second["exception"].endswith("ValueError: x\ny")


def parsed(line: str) -> dict[str, Any]:
    """logfmt."""
    fields, decoder = {}, json.JSONDecoder()
    while line:
        name, _, line = line.partition("=")
        if line.startswith('"'):
            fields[name.strip()], end = decoder.raw_decode(line)
            line = line[end:]
        else:
            fields[name.strip()], _, line = line.partition(" ")
    return fields


def test_in_the_journal_each_line_has_its_priority_and_no_time() -> None:
    info, *error = logged("plain", journal=True)
    assert info == "<6>shard 2: session 1f with b is up"
    assert len(error) > 3 and all(line.startswith("<3>") for line in error)
    assert logged("json", journal=True)[0].startswith('<6>{"time":')
    assert logged("plain")[0][4] == "-", "a pipe that is no journal has times"


def test_logs_prints_the_last_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vpnd.cli import main

    (tmp_path / "vpnd.log").write_text("".join(f"line {number} {'x' * 90}\n" for number in range(5000)))
    assert main(["logs", "--state-dir", str(tmp_path), "-n", "1000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1000 and lines[0].startswith("line 4000 ") and lines[-1].startswith("line 4999 ")


def test_logs_says_when_the_lines_are_not_of_the_node_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vpnd.cli import main

    command = ["logs", "--state-dir", str(tmp_path)]
    with daemon(tmp_path, {"ready": True, "health": "healthy"}):
        assert main(command) == MachineError.exit_code
        assert "not with --detach" in capsys.readouterr().err
        (tmp_path / "vpnd.log").write_text("old\n")
        assert main(command) == 0
        said = capsys.readouterr()
        assert said.out == "old\n" and "of one before it" in said.err
    assert main(command) == 0
    assert capsys.readouterr().err == ""


def test_logs_follows_also_when_the_file_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "vpnd.log"
    file.write_text("one\n")
    command = [sys.executable, "-P", "-m", "vpnd", "logs", "-f", "--state-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "one\n"
        with open(file, "a") as log:
            log.write("a line longer than what comes\n")
        assert process.stdout.readline() == "a line longer than what comes\n"
        os.truncate(file, 0)
        with open(file, "a") as log:
            log.write("anew\n")
        assert process.stdout.readline() == "anew\n"
        process.terminate()
