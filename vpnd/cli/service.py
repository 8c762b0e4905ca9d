"""`vpnd service`: a node as a service of systemd, started with the machine.

The unit is written for the vpnd that is asked: its interpreter, state directory and configuration. A package has the
same unit from `vpnd service unit`. `UNIT` says what it takes from a node and what it must leave it; tests run a node
with these capabilities and let systemd judge the rest.
"""

from __future__ import annotations

import compileall
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import typer

from vpnd import privileges
from vpnd.cli.command import Where, command, group, option
from vpnd.config import paths
from vpnd.config.values import OWN_USER
from vpnd.errors import MachineError, PrivilegeError

app = group("Run the node as a service of systemd, from boot on.")

NAME = "vpnd.service"
#: Of the machine's own units; those of packages are below /usr/lib.
UNIT_FILE = Path("/etc/systemd/system", NAME)
#: There while systemd runs the machine (sd_booted(3)).
BOOTED = Path("/run/systemd/system")
TREE = Path(__file__).resolve().parents[2]
#: Where ProtectHome=yes lets nobody read.
HOMES = (Path("/home"), Path("/root"), Path("/run/user"))

#: What a node needs of root's rights; its children give up all of them before they touch a byte from the network.
CAPABILITIES = {
    "CAP_NET_ADMIN": "the TUN device, addresses, routes, rules, nftables",
    "CAP_NET_BIND_SERVICE": "port 53 on the virtual addresses",
    "CAP_SETUID": "children become process.user",
    "CAP_SETGID": "the same",
    "CAP_SETPCAP": "children empty their bounding set",
    "CAP_KILL": "children of another user are ended",
    "CAP_CHOWN": "the network's directory is process.user's",
    "CAP_SYS_NICE": "process.realtime",
}

UNIT = """\
[Unit]
Description=vpnd, a peer-to-peer mesh VPN
Documentation=man:vpnd(1)
Wants=network-online.target modprobe@tun.service
After=network-online.target modprobe@tun.service nftables.service systemd-resolved.service

[Service]
Type=notify
NotifyAccess=main
ExecStart={command} start
ExecReload={command} reload
{environment}\
# 2, 4: what only its user can mend
RestartPreventExitStatus=2 4
Restart=on-failure
RestartSec=2s
WatchdogSec=30s
TimeoutStartSec=90s
TimeoutStopSec=20s
# Children, which the supervisor ends in order, ignore SIGTERM, and so does who cleans up when it was killed
KillMode=control-group
LimitNOFILE=65536

{state}\
UMask=0077
{capabilities}
AmbientCapabilities=
NoNewPrivileges=yes
PrivateDevices=yes
BindPaths=/dev/net/tun
DevicePolicy=closed
DeviceAllow=/dev/net/tun rw
ProtectSystem=strict
ProtectHome={home}
PrivateTmp=yes
PrivateMounts=yes
ProtectProc=invisible
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
# Of its own device it keeps IPv6 autoconfiguration away
ReadWritePaths=-/proc/sys/net/ipv6/conf
# Names of members, where systemd-resolved does not run (dns.hosts_file)
ReadWritePaths=-/etc/hosts
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
KeyringMode=private
SystemCallArchitectures=native
# seccomp: children give up more system calls by themselves (process.seccomp)
SystemCallFilter=@system-service seccomp
SystemCallFilter=~@keyring @memlock
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


@command(app)
def unit(
    place: Where,
    executable: str = option("", "--exec", "What starts vpnd; this one by default.", "COMMAND"),
) -> None:
    """Print the unit."""
    typer.echo(text(place.absolute(), shlex.split(executable) or this_vpnd()), nl=False)


@command(app)
def install(
    place: Where,
    now: bool = option(False, "--now", "Start it at once, not only at the next boot."),
) -> None:
    """Make the node a service that starts with the machine; its state stays where it is.

    Needs root and systemd. A node that runs already has to be stopped before the service is started.
    """
    _needs_root()
    # looked at before anything is written: the program alone may be there, in a container
    if not (shutil.which("systemctl") and BOOTED.is_dir()):
        raise MachineError("systemd does not run this machine; use its own service manager")
    if privileges.existing(OWN_USER) != OWN_USER:
        raise MachineError(f"the user {OWN_USER} could not be made; make it: useradd --system {OWN_USER}")
    _write(text(place.absolute(), this_vpnd()))
    compile_tree(TREE)
    _systemctl("daemon-reload")
    _systemctl("enable", *(["--now"] if now else []), NAME)
    then = "it runs" if now else f"start it: systemctl start {NAME}"
    typer.echo(f"{UNIT_FILE}: written and enabled; {then}. Its log: journalctl -u {NAME}")


@command(app)
def uninstall(place: Where) -> None:
    """Stop the service and take the unit away; identity, network and configuration stay."""
    _needs_root()
    if not UNIT_FILE.exists():
        raise MachineError(f"{UNIT_FILE}: there is none; a package's service is removed with the package")
    _systemctl("disable", "--now", NAME)
    UNIT_FILE.unlink(missing_ok=True)
    _systemctl("daemon-reload")
    typer.echo(f"{UNIT_FILE}: removed; identity and network stay in the state directory")


def text(place: Where, vpnd: list[str]) -> str:
    """The unit of the node at `place`, run by the command `vpnd`."""
    where = paths.places(*place, os.environ)
    variables = {"VPND_STATE_DIR": str(where.state_dir)}
    if where.named:
        variables["VPND_CONFIG"] = str(where.config_file)
    elif where.state_dir == paths.DEFAULT_STATE_DIR:
        variables = {}
    own = where.state_dir == paths.DEFAULT_STATE_DIR
    state = (
        "StateDirectory=vpnd\nStateDirectoryMode=0700\n" if own else f'ReadWritePaths="{where.state_dir}"\n'
    )
    at_home = any(Path(part).is_relative_to(home) for part in _read(where, vpnd) for home in HOMES)
    return UNIT.format(
        command=shlex.join(vpnd),
        environment="".join(f'Environment="{name}={value}"\n' for name, value in variables.items()),
        state=state,
        capabilities="\n".join(
            f"# {why}\nCapabilityBoundingSet={name}" for name, why in CAPABILITIES.items()
        ),
        home="read-only" if at_home else "yes",
    )


def _read(where: paths.Places, vpnd: list[str]) -> list[str]:
    """Paths that the service uses beside those of the system."""
    return [vpnd[0], str(Path(__file__)), str(where.state_dir), str(where.config_file)]


def this_vpnd() -> list[str]:
    """The command that is this very vpnd: its environment's own, else the interpreter with the module."""
    script = Path(sys.executable).with_name("vpnd")
    # -P: the working directory is no place for modules
    return [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-P", "-m", "vpnd"]


def compile_tree(tree: Path) -> None:
    """Byte code for a clone of the source: the service cannot write it, and would compile everything at each start,
    which is half of what that takes. Packages have theirs."""
    if (tree / "pyproject.toml").exists():
        for name in ("shards", "supervisor", "vpnd"):
            compileall.compile_dir(tree / name, quiet=2)


def _needs_root() -> None:
    if os.geteuid() != 0:
        raise PrivilegeError("a service of the machine is root's affair; run it with sudo")


def _write(unit: str) -> None:
    try:
        UNIT_FILE.parent.mkdir(parents=True, exist_ok=True)
        UNIT_FILE.write_text(unit)
    except OSError as error:
        raise MachineError(
            f"{UNIT_FILE}: cannot be written ({error.strerror}); `vpnd service unit` prints it for another place"
        ) from None


def _systemctl(*words: str) -> None:
    """Raises MachineError with what it said."""
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise MachineError(
            f"systemctl {' '.join(words)}: {said[-1] if said else f'exit code {done.returncode}'}"
        )
