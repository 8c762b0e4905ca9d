"""What the commands to a running node talk to, without the node: a process with a status socket."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

#: A daemon as small as can be: its status socket. Arguments: path, answer of status, seconds to stop. "commands" in the
#: answer has those of other commands. What is asked is written to the path with ".asked" behind it.
DAEMON = """
import json, os, socket, sys, time
path, answer, stop_s = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
answer.setdefault("supervisor", {})["pid"] = os.getpid()
commands = answer.pop("commands", {})
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
print("listening", flush=True)
while True:
    client, _ = server.accept()
    request = json.loads(client.makefile().readline())
    command = request["command"]
    if command != "status":
        with open(path + ".asked", "a") as file:
            print(json.dumps(request), file=file)
    told = {"stopping": True} if command == "stop" else commands.get(command, answer)
    client.sendall(json.dumps(told).encode())
    client.close()
    if command in ("stop", "leave"):
        time.sleep(stop_s)
        os.unlink(path)
        break
"""


@contextlib.contextmanager
def daemon(state_dir: Path, answer: object, stop_s: float = 0.0):
    command = [sys.executable, "-c", DAEMON, str(state_dir / "vpnd.sock"), json.dumps(answer), str(stop_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"listening\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
