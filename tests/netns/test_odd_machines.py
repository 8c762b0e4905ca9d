"""A node starts where others start: without a resolver, with a long name, without a reader; else it says why not."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from lab import Lab, LabError, Node, module_command, wait_until
from lab.joining import machine

from vpnd.logs import Output

pytestmark = pytest.mark.root

START_S = 30.0


def prepared(node: Node, script: str) -> list[str]:
    """vpnd in a mount and host-name namespace of its own, where `script` was run first."""
    return ["unshare", "-m", "-u", "sh", "-ec", f'{script}\nexec "$@"', "sh", *node.command]


def resolver(content: bytes, mode: int = 0o644) -> str:
    octal = "".join(f"\\{byte:03o}" for byte in content)
    text = f"printf '{octal}' > $D/resolv.conf; chmod {mode:o} $D/resolv.conf"
    return f"D=$(mktemp -d); {text}; mount --bind $D/resolv.conf /etc/resolv.conf; rm -r $D || true"


OTHER_ETC = "D=$(mktemp -d); cp -a /etc/. $D; mount --bind $D /etc; rm -f /etc/resolv.conf"
MACHINES = {
    "an empty resolv.conf": resolver(b""),
    "one that others may not read": resolver(b"nameserver 192.0.2.1\n", 0o600),
    "a comment in Latin-1": resolver(b"# caf\xe9\nnameserver 192.0.2.1\n"),
    "a search label of 70": resolver(b"nameserver 192.0.2.1\nsearch " + b"a" * 70 + b"\n"),
    "no resolv.conf": OTHER_ETC,
    "a resolv.conf that leads nowhere": f"{OTHER_ETC}; ln -s /nowhere/x /etc/resolv.conf",
    "a name of 64 characters": "hostname " + "a" * 64,
    "a name with a dot and capitals": "hostname Some-Host.example.org",
}


def test_where_others_start() -> None:
    with Lab(len(MACHINES)) as lab:
        nodes = [machine(lab, place) for place in range(len(MACHINES))]
        for node, script in zip(nodes, MACHINES.values(), strict=True):
            node.command = prepared(node, script)
            node.start()
        for node, what in zip(nodes, MACHINES, strict=True):
            try:
                node.wait_ready(START_S)
            except LabError as error:
                raise AssertionError(f"{what}: {error}") from error
        for node in nodes:
            assert node.stop() == 0


def test_what_is_missing_is_named() -> None:
    with Lab(2) as lab:
        node = machine(lab, 0)
        node.command = ["setpriv", "--bounding-set", "-setuid", "--inh-caps", "-setuid", *module_command()]
        node.start()
        assert node.wait_ended(START_S) == 4
        assert "SETUID" in node.log_tail(1) and "Traceback" not in node.log_file.read_text()
        gone = lab.directory / "gone"
        for words, code in ((["id"], 0), (["--config", "x.toml", "id"], 2), (["--state-dir", "x", "id"], 2)):
            command = [
                "sh",
                "-c",
                f'mkdir {gone}; cd {gone}; rmdir {gone}; exec "$@"',
                "sh",
                *module_command(),
            ]
            done = lab.run(node.namespace, *command, *words, env=node.env, check=False)
            assert done.returncode == code and "Traceback" not in done.stderr
            assert "working directory" in done.stderr or not code


def spawned(lab: Lab, node: Node, output: int, error: int) -> subprocess.Popen[bytes]:
    node.write_config()
    command = ["ip", "netns", "exec", node.namespace.name, *node.command, "start", "--log-level", "debug"]
    return subprocess.Popen(command, stdout=output, stderr=error, env={**os.environ, **node.env})


def test_nobody_reads() -> None:
    with Lab(2) as lab:
        node = machine(lab, 0)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        filled = 0
        while True:
            try:
                filled += os.write(writing, b"\n" * 4096)
            except BlockingIOError:
                break
        os.set_blocking(writing, True)
        process = spawned(lab, node, writing, writing)
        try:
            node.wait_ready(START_S)
            for _ in range(20):
                assert node.ask("reload") == {**node.ask("reload"), "applied": []}
            # somebody reads again: what is there, and how much is not
            said = b""
            while len(said) < filled:
                said += os.read(reading, 65536)
            node.ask("reload")
            said = os.read(reading, 65536)
            assert b"dropped here: nobody read them" in said
            assert node.ask("stop")
            assert process.wait(START_S) == 0
        finally:
            process.kill()
            os.close(reading)
            os.close(writing)


def test_a_reader_that_leaves_leaves_no_daemon() -> None:
    with Lab(2) as lab:
        node = machine(lab, 0)
        reading, writing = os.pipe()
        process = spawned(lab, node, writing, writing)
        os.close(writing)
        os.read(reading, 1)  # head -1
        os.close(reading)
        assert process.wait(START_S) == 1
        wait_until(lambda: not lab.leaks(), START_S, "nothing of it is left")


def test_a_line_is_never_waited_for(tmp_path: Path) -> None:
    """Neither where the pipe may be opened once more, nor where it may not."""
    for closed in (False, True):
        reading, writing = os.pipe()
        output = Output(writing)
        if closed:
            output._fd, output._ask = writing, True
        began_s = time.monotonic()
        for number in range(5000):
            output.tell(f"line {number:0100d}")
        assert time.monotonic() - began_s < 2.0
        got = os.read(reading, 1 << 20)
        output.tell("last")
        got += os.read(reading, 1 << 20)
        *lines, note, last = got.decode().splitlines()
        assert lines[:2] == [f"line {number:0100d}" for number in range(2)] and last == "last"
        assert note == f"{5000 - len(lines):,} lines dropped here: nobody read them"
        os.close(reading)
        with pytest.raises(BrokenPipeError):
            output.tell("to nobody")
        output.write("is not complained about\n")
        os.close(writing)
