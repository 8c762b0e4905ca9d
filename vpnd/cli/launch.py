"""Starting the daemon detached, in a process of its own, and what is done before it starts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import vpnd
from vpnd import statusclient, trust
from vpnd.config import load, paths
from vpnd.config.schema import Config
from vpnd.errors import ChildError, ConfigError, MachineError, VpndError
from vpnd.logs import printable
from vpnd.printable import wrapped
from vpnd.status import Status, known_as


def make_state_dir(config: Config) -> None:
    """Make the state directory, open to its owner only, if it is missing. Raises ConfigError, also for one that
    others could change."""
    try:
        Path(config.state_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        text = f"state directory {config.state_dir}: cannot be made ({error.strerror})"
        raise ConfigError(f"{text}; give another --state-dir") from None
    trust.check(Path(config.state_dir), "state directory")


def read_token(given: str, what: str) -> str:
    """A token: `given`, or standard input for "-", which no other user of the machine can see. `what`: how it was
    given.

    Raises ConfigError for one with a typing error; what it is good for only its network knows.
    """
    from vpnd.membership import token
    from vpnd.membership.refusal import MembershipRefused

    text = _typed(token.MAX_TEXT + 1) if given == "-" else given
    try:
        token.parse_untrusted(text)
    except MembershipRefused as refusal:
        raise ConfigError(f"{what}: {refusal}, as `vpnd invite` printed it") from None
    return "".join(text.split())


def _typed(most: int) -> str:
    """Standard input: a line of a person, everything from a program."""
    if not sys.stdin.isatty():
        return sys.stdin.read(most)
    print("token: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline(most)


def detached(config: Config, places: paths.Places, overrides: Mapping[str, object], token: str) -> None:
    """Start the node in a session of its own, to join by `token` if there is one; return when it answers as ready.

    Its output goes to the log file in the state directory. Raises VpndError with its last error and exit
    code when it ends instead, ChildError when it does not get ready in time; nothing is left running then.
    """
    log = paths.log_file(config)
    try:
        fd = trust.open_file(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        raise MachineError(f"{log}: {error.strerror}; move it away, or give another --state-dir") from None
    try:
        log_start = os.fstat(fd).st_size
        process = subprocess.Popen(
            _command(places, overrides, token),
            stdin=subprocess.PIPE if token else subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            cwd="/",
            env=_environment(places),
            start_new_session=True,
        )
    finally:
        os.close(fd)
    if process.stdin is not None:
        # not among its arguments, which everybody on the machine can read; one that has ended says so below
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(token.encode())
    more_time_s = config.membership.join_timeout if token else 0.0
    try:
        status = _wait_ready(process, config, log, log_start, more_time_s)
    except BaseException:
        _end(process, config.process.stop_timeout)
        raise
    network = status.network
    where = f"{status.node.virtual_ip} on {config.network.interface}"
    print(wrapped(printable(f"vpnd: {known_as(status)} runs as {where}, process {process.pid}, log {log}")))
    if network is not None and network.authority and not status.peers:
        print(
            wrapped("vpnd: next: `vpnd invite` prints a token; on the other machine: vpnd start --join TOKEN")
        )


def _command(places: paths.Places, overrides: Mapping[str, object], token: str) -> list[str]:
    # -P: the current directory is no place for modules
    command = [sys.executable, "-P", "-m", "vpnd", "start"]
    if places.named == "--config":
        command += ["--config", str(places.config_file.absolute())]
    for path, value in overrides.items():
        if value is not None:
            command += [load.FLAGS[path], str(value)]
    return command + ["--join", "-"] if token else command


def _environment(places: paths.Places) -> dict[str, str]:
    """That of this process, with paths made absolute and this very vpnd found."""
    environment = dict(os.environ)
    environment["VPND_STATE_DIR"] = str(places.state_dir)
    if places.named == "VPND_CONFIG":
        environment["VPND_CONFIG"] = str(places.config_file.absolute())
    source = str(Path(vpnd.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH")]))
    return environment


def _wait_ready(
    process: subprocess.Popen[bytes], config: Config, log: Path, log_start: int, more_time_s: float
) -> Status:
    """The status it answers with. `more_time_s`: beyond what a start takes by the configuration."""
    # control gets ready, then the shards; what fails is stopped before the daemon says so
    process_s = config.process
    limit_s = 2 * process_s.ready_timeout + process_s.stop_timeout + config.status.timeout + more_time_s
    for answer in _answers(config, limit_s):
        # an older daemon may be answering on this socket
        if answer.ready and answer.supervisor.pid == process.pid:
            return answer
        code = process.poll()
        if code is not None:
            error = VpndError(_last_error(log, log_start) or f"the daemon ended at once; see {log}")
            error.exit_code = code if code > 0 else VpndError.exit_code
            raise error
    raise ChildError(f"the daemon was not ready within {limit_s:g} s and was stopped; see {log}")


def wait_moved(config: Config, network_id: str) -> None:
    """Return when the daemon, which starts again in another network, is ready in it. Raises ChildError."""
    process_s = config.process
    limit_s = 2 * process_s.stop_timeout + 2 * process_s.ready_timeout + config.status.timeout
    for answer in _answers(config, limit_s):
        if answer.ready and answer.network is not None and answer.network.network_id == network_id:
            return
    raise ChildError(
        f"it is a member now, but the node was not ready again within {limit_s:g} s; see its log"
    )


def _answers(config: Config, within_s: float) -> Iterator[Status]:
    """What the daemon says of itself, again and again for so long; an empty status each time it does not answer."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        try:
            yield statusclient.status(paths.status_socket(config), config.status.timeout)
        except VpndError:
            yield Status()
        time.sleep(config.status.poll_interval)


def _last_error(log: Path, start: int) -> str:
    """The last line the daemon wrote, its errors before anything else it said."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").split("\n")
    written = [line.strip() for line in lines if line.strip()]
    mark = "vpnd: error: "
    errors = [line.removeprefix(mark) for line in written if line.startswith(mark)]
    return (errors or written or [""])[-1]


def _end(process: subprocess.Popen[bytes], stop_timeout_s: float) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(2 * stop_timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
