"""The command line as a user meets it: what it prints, where, and its exit code."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from fake_daemon import daemon

from vpnd import errors, peerid, statusclient
from vpnd.cli import launch, main
from vpnd.cli.command import write_new
from vpnd.config.schema import Config, Status

ROOT = Path(__file__).resolve().parent.parent

STATUS = {"ready": True, "health": "healthy", "node": {"name": "a"}}


def vpnd(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vpnd", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=ROOT, env={**os.environ, **environ}
    )


def test_id_prints_the_peer_id_alone_and_the_same_one_again(tmp_path, capsys):
    for arguments in (["id", "--state-dir", str(tmp_path)], ["--state-dir", str(tmp_path), "id"]):
        assert main(arguments) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert peerid.public_key_untrusted(first)


def test_the_environment_places_the_node_and_flags_win(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VPND_STATE_DIR", str(tmp_path / "env"))
    monkeypatch.setenv("VPND_CONFIG", str(tmp_path / "env" / "vpnd.toml"))
    assert main(["id"]) == 0
    assert (tmp_path / "env" / "identity.pem").exists()
    assert main(["--state-dir", str(tmp_path / "flag"), "id"]) == 0
    assert (tmp_path / "flag" / "identity.pem").exists()


def test_quick_commands_load_neither_libp2p_nor_the_supervisor(tmp_path):
    program = (
        "import sys; from vpnd.cli import main; main(['--state-dir', sys.argv[1], 'id']);"
        "main(['--state-dir', sys.argv[1], 'status']);"
        "print(sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    loaded = run.stdout.splitlines()[-1]
    assert not {"libp2p", "supervisor", "shards", "trio", "asyncio", "rich"} & set(eval(loaded))


USAGE = [
    ("an unknown command", ["strat"]),
    ("an unknown option", ["status", "--jsno"]),
    ("words for a number", ["start", "--shards", "many"]),
]


@pytest.mark.parametrize(("what", "arguments"), USAGE, ids=[row[0] for row in USAGE])
def test_wrong_usage_ends_with_2_on_standard_error(what, arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err


@pytest.mark.parametrize("command", ["status", "stop", "reload", "scale"])
def test_without_a_daemon_one_line_says_what_to_do(command, tmp_path, capsys):
    command = [command, "2"] if command == "scale" else [command]
    assert main([*command, "--state-dir", str(tmp_path)]) == errors.NotRunningError.exit_code
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "vpnd.sock"))  # what a killed daemon leaves: a file nobody listens behind
    assert main([*command, "--state-dir", str(tmp_path)]) == errors.NotRunningError.exit_code
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("vpnd: error: no daemon answers on")
        assert line.endswith("start it: sudo vpnd start")


def test_a_daemon_that_says_nothing_is_given_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VPND_STATUS_TIMEOUT", "100ms")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "vpnd.sock"))
        silent.listen()
        assert main(["status", "--state-dir", str(tmp_path)]) == errors.NotRunningError.exit_code
    assert "has not answered within 0.1 s" in capsys.readouterr().err


def test_an_error_of_the_daemon_is_told(tmp_path, capsys):
    with daemon(tmp_path, {"error": "not now"}):
        assert main(["status", "--state-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "vpnd: error: the daemon refused: not now\n"


def test_stop_returns_when_the_process_is_gone(tmp_path):
    with daemon(tmp_path, STATUS, stop_s=0.3) as process:
        assert main(["stop", "--state-dir", str(tmp_path)]) == 0
        assert process.poll() == 0
    assert not (tmp_path / "vpnd.sock").exists()


def test_stop_does_not_wait_for_ever(tmp_path):
    with daemon(tmp_path, STATUS, stop_s=30) as process, pytest.raises(errors.ChildError, match="kill -9"):
        statusclient.end(tmp_path / "vpnd.sock", {"command": "stop"}, 5.0, 0.1, 0.01)
    assert process.returncode is not None


def test_a_wrong_configuration_stops_every_command_that_uses_it(tmp_path, capsys):
    (tmp_path / "vpnd.toml").write_text("[status]\ntimeout = 1\n[network]\nmtu = 1\n")
    for command in (["config", "check"], ["config", "show"], ["status"]):
        assert main([*command, "--state-dir", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all(line.startswith(f"vpnd: error: {tmp_path}/vpnd.toml: ") for line in lines)


def test_init_writes_a_good_file_once(tmp_path, capsys):
    state = tmp_path / "new"
    assert main(["config", "--state-dir", str(state), "check"]) == 0
    assert main(["config", "init", "--state-dir", str(state)]) == 0
    assert main(["config", "check", "--state-dir", str(state)]) == 0
    written = (state / "vpnd.toml").read_text()
    assert main(["config", "init", "--state-dir", str(state)]) == 2
    assert (state / "vpnd.toml").read_text() == written
    assert "not overwritten" in capsys.readouterr().err


def test_show_tells_the_origin_of_each_value(tmp_path, capsys, monkeypatch):
    (tmp_path / "vpnd.toml").write_text("[network]\nmtu = 1280\n")
    monkeypatch.setenv("VPND_WORKER_SHARDS", "2")
    assert main(["config", "show", "--json", "--state-dir", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["network"]["mtu"] == {"value": 1280, "origin": str(tmp_path / "vpnd.toml")}
    assert shown["worker"]["shards"] == {"value": 2, "origin": "VPND_WORKER_SHARDS"}
    assert shown["network"]["subnet"] == {"value": 16, "origin": "default"}


def test_start_needs_root_and_says_how(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["start", "--state-dir", str(tmp_path)]) == errors.PrivilegeError.exit_code
    assert "needs root; run: sudo" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.root
def test_start_refuses_a_wrong_configuration_before_it_touches_anything(tmp_path, capsys):
    state = tmp_path / "state"
    assert main(["start", "--state-dir", str(state), "--shards", "99", "--detach"]) == 2
    assert not state.exists()
    assert capsys.readouterr().err.startswith("vpnd: error: --shards: worker.shards = 99: must be at most 64")


def in_own_network(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run vpnd in a network namespace without a name: it goes with the last process in it."""
    inside = f"ip link set lo up && exec {sys.executable} -m vpnd " + " ".join(arguments)
    command = ["unshare", "--net", "sh", "-c", inside]
    # no pipes: the daemon must not hold what the test reads to its end
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        run = subprocess.run(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, timeout=60, cwd=ROOT)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, run.returncode, out.read(), err.read())


@pytest.mark.root
def test_a_detached_node_is_ready_when_the_command_returns_and_stop_ends_it(tmp_path, capsys):
    place = ["--state-dir", str(tmp_path)]
    (tmp_path / "vpnd.toml").write_text('[p2p]\nlisten = ["/ip4/127.0.0.1/tcp/0"]\n[worker]\nshards = 1\n')
    started = in_own_network("start", "--detach", *place)
    try:
        assert started.returncode == 0, started.stderr
        assert "10.86." in started.stdout
        assert main(["status", "--json", *place]) == 0
        pid = json.loads(capsys.readouterr().out)["supervisor"]["pid"]
        assert f"process {pid}" in started.stdout
        again = in_own_network("start", "--detach", *place)
        assert again.returncode == errors.AlreadyRunningError.exit_code
        assert again.stderr.count("\n") == 1
        assert again.stderr.startswith("vpnd: error: ")
    finally:
        stopped = main(["stop", *place])
    assert stopped == 0
    assert not (tmp_path / "vpnd.sock").exists()
    # init may not have collected it yet
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.root
def test_a_detached_node_that_cannot_start_says_why(tmp_path):
    (tmp_path / "vpnd.toml").write_text('[p2p]\nlisten = ["/ip4/192.0.2.1/tcp/4001"]\n')
    started = in_own_network("start", "--detach", "--state-dir", str(tmp_path))
    assert started.returncode > 0
    assert started.stderr.count("\n") == 1
    assert "192.0.2.1" in started.stderr
    assert main(["status", "--state-dir", str(tmp_path)]) == errors.NotRunningError.exit_code


@pytest.mark.parametrize(
    "words", [["-h"], ["--help"], ["status", "-h"], ["config", "show", "-h"]], ids=" ".join
)
def test_help_is_there_by_both_its_names(words, capsys):
    assert main(words) == 0
    assert "Usage: vpnd" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["version", "--version"])
def test_version_is_that_of_the_package(word):
    run = vpnd(word)
    assert run.returncode == 0
    assert run.stdout.startswith("vpnd 0.")


def test_ctrl_c_is_no_traceback(tmp_path):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "vpnd.sock"))
        silent.listen()
        silent.settimeout(30)
        command = [sys.executable, "-m", "vpnd", "status", "--state-dir", str(tmp_path)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
        client, _ = silent.accept()  # now it waits for the answer
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        client.close()
    assert process.returncode == 130
    assert b"Traceback" not in said


def test_a_closed_pipe_is_no_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "vpnd", "config", "reference"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    said = process.stderr.read()
    process.wait(30)
    process.stderr.close()
    assert b"Traceback" not in said


@pytest.mark.parametrize("words", [["config", "reference"], ["--help"]], ids=" ".join)
def test_a_full_disk_is_no_traceback(words):
    with open("/dev/full", "wb") as full:
        run = subprocess.run(
            [sys.executable, "-m", "vpnd", *words],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert (
        line.startswith("vpnd: error: standard output: cannot be written (No space left") and "room" in line
    )


def test_a_file_that_cannot_be_written_whole_is_not_left_there(tmp_path):
    there = tmp_path / "there"
    there.touch()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # Python ignores SIGXFSZ: the write fails
    try:
        with pytest.raises(OSError, match="File too large"):
            write_new(tmp_path / "new", "text" * 100)
        with pytest.raises(FileExistsError):
            write_new(there, "text")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [there]


@pytest.mark.setting("status.timeout")
def test_a_daemon_that_says_nothing_is_waited_for_as_long_as_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VPND_STATUS_TIMEOUT", "200ms")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "vpnd.sock"))
        silent.listen()
        assert main(["status", "--state-dir", str(tmp_path)]) == errors.NotRunningError.exit_code
    assert "has not answered within 0.2 s" in capsys.readouterr().err


@pytest.mark.setting("status.poll_interval")
def test_whether_a_daemon_is_ready_is_looked_at_that_often(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(launch.time, "sleep", waits.append)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    polled = iter([None, None, 1])
    monkeypatch.setattr(process, "poll", lambda: next(polled))
    (log := tmp_path / "vpnd.log").write_text("")
    config = Config(state_dir=str(tmp_path), status=Status(poll_interval=0.7))
    with pytest.raises(errors.VpndError):
        launch._wait_ready(process, config, log, 0, 0.0)
    process.communicate()
    assert waits == [0.7, 0.7]
