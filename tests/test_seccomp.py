"""What the kernel refuses each kind of child; every case in a process of its own. Of the other machine, on which no
test runs here, the program is gone through by the numbers of the kernel's headers."""

from __future__ import annotations

import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from vpnd import seccomp

ROOT = Path(__file__).resolve().parents[1]
ROLES = ("CONTROL", "EXPORTER", "RELAY", "SHARD")

PRELUDE = """
import ctypes, errno, fcntl, os, signal, socket, struct, threading, time
from vpnd import seccomp
libc = ctypes.CDLL(None, use_errno=True)
parent, log = os.getppid(), os.open("/dev/null", os.O_WRONLY)
ours, theirs = socket.socketpair()
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS

def refused(attempt, why=errno.EPERM):
    try:
        result = attempt()
    except OSError as error:
        assert error.errno == why, error
        return True
    return result == -1 and ctypes.get_errno() == why
"""

#: Each works in some way for a process without rights, or is there for holes in kernels; none in a child.
ATTEMPTS = {
    "start a program": "os.execv('/bin/true', ['true'])",
    "start a program from a descriptor": "os.execve(log, ['true'], {})",
    "fork": "os.fork()",
    "a process by another name": "libc.syscall(56 if os.uname().machine == 'x86_64' else 220, 17, 0, 0, 0, 0)",
    "trace": "libc.ptrace(0, 0, 0, 0)",
    "read another's memory": "libc.process_vm_readv(parent, None, 0, None, 0, 0)",
    "signal another": "os.kill(parent, 0)",
    "signal another's thread": "libc.syscall(234 if os.uname().machine == 'x86_64' else 131, parent, parent, 0)",
    "signal another by its pidfd": "signal.pidfd_send_signal(os.pidfd_open(parent), 0)",
    "limit another": "libc.prlimit(parent, 7, None, None)",
    "take another's descriptor": "libc.syscall(438, os.pidfd_open(parent), 0, 0)",
    "have a namespace": "libc.unshare(0x10000000)",
    "enter a namespace": "libc.setns(log, 0)",
    "mount": "libc.mount(b'x', b'/tmp', b'tmpfs', 0, None)",
    "chroot": "os.chroot('/')",
    "BPF": "libc.syscall(321 if os.uname().machine == 'x86_64' else 280, 0, None, 0)",
    "performance counters": "libc.syscall(298 if os.uname().machine == 'x86_64' else 241, None, 0, 0, 0, 0)",
    "keys": "libc.syscall(250 if os.uname().machine == 'x86_64' else 219, 0, 0, 0, 0, 0)",
    "a file by its handle": "libc.open_by_handle_at(0, None, 0)",
    "load a module": "libc.syscall(313 if os.uname().machine == 'x86_64' else 273, log, b'', 0)",
    "set the clock": "time.clock_settime(time.CLOCK_REALTIME, time.time())",
    "a device": "os.mknod('/tmp/x', 0o020600, 0)",
}


def run(role: str, code: str) -> None:
    code = f"{PRELUDE}seccomp.confine(seccomp.{role})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("role", ROLES)
def test_no_child_can(role: str) -> None:
    run(
        role, f"done = [what for what, attempt in {ATTEMPTS!r}.items() if not refused(lambda: eval(attempt))]\n"
        "assert not done, done",
    )  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
def test_what_is_newer_than_the_filter_does_not_exist(role: str) -> None:
    run(
        role,
        "assert all(refused(lambda: libc.syscall(n, 0, 0, 0), errno.ENOSYS) for n in (435, 425, 463, 999, 1 << 30))",
    )


@pytest.mark.parametrize("role", ROLES)
def test_a_child_has_threads_signals_of_its_own_and_what_it_was_given(role: str) -> None:
    run(
        role,
        """
thread = threading.Thread(target=ours.send, args=(b"x",))
thread.start()
thread.join()
assert theirs.recv(9) == b"x"
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.raise_signal(signal.SIGUSR1)
theirs.setblocking(False)
os.write(log, b"x")
""",
    )


def test_control_makes_the_sockets_and_files_it_needs_and_no_others() -> None:
    run(
        "CONTROL",
        """
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
    socket.socket(family, socket.SOCK_STREAM).close()
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()
socket.getaddrinfo("localhost", 80)
open("/etc/passwd").close()
os.close(os.dup(log))
for family in (socket.AF_PACKET, socket.AF_ALG, socket.AF_VSOCK, socket.AF_CAN, 44):
    assert refused(lambda: socket.socket(family, socket.SOCK_RAW), errno.EAFNOSUPPORT), family
assert refused(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12), errno.EAFNOSUPPORT)
""",
    )


@pytest.mark.parametrize("role", ["EXPORTER", "RELAY", "SHARD"])
def test_the_others_have_neither_files_nor_sockets_of_their_own(role: str) -> None:
    run(
        role,
        """
assert refused(lambda: open("/etc/passwd")) and refused(lambda: os.unlink("/tmp/x"))
assert refused(lambda: socket.socket()) and refused(lambda: ours.connect("/x")) and refused(lambda: ours.listen())
""",
    )


def test_a_shard_cannot_make_its_supervisor_wait() -> None:
    """Waiting or not is a mode of what a descriptor leads to, which both share."""
    run(
        "SHARD",
        """
seccomp.keep_modes([log])
FIONBIO, TUNSETOFFLOAD = 0x5421, 0x400454D0
for request, argument in ((FIONBIO, struct.pack("i", 0)), (TUNSETOFFLOAD, 0)):
    assert refused(lambda: fcntl.ioctl(log, request, argument))
assert refused(lambda: fcntl.fcntl(log, fcntl.F_SETFL, 0)) and refused(lambda: fcntl.fcntl(log, fcntl.F_DUPFD, 0))
assert refused(lambda: os.dup(log)) and refused(lambda: os.dup2(log, 99)) and refused(socket.socketpair)
ours.setblocking(False)
""",
    )


#: What Linux' arch/arm64/include/uapi/asm/unistd.h wants of asm-generic.
GENERIC = ("RENAMEAT", "NEW_STAT", "SET_GET_RLIMIT", "TIME32_SYSCALLS", "SYS_CLONE3", "MEMFD_SECRET")
HEADERS = {
    "aarch64": (
        "asm-generic/unistd.h",
        "-D__BITS_PER_LONG=64",
        *(f"-D__ARCH_WANT_{name}" for name in GENERIC),
    ),
    platform.machine(): ("asm/unistd.h",),
}
#: Linux include/uapi/linux/audit.h: i386, none of our machines.
OTHER_ABI = 0x4000_0003
PID = 4711


def numbers(header: str, *options: str) -> dict[str, int]:
    """System calls by name, as the kernel's header has them."""
    done = subprocess.run(
        ["cc", "-E", "-dM", "-x", "c", *options, "-include", header, "/dev/null"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    macros = dict(re.findall(r"^#define (__NR\w*) (\w+)$", done.stdout, re.M))
    found = {name[len("__NR_") :]: macros.get(value, value) for name, value in macros.items()}
    return {name: int(value) for name, value in found.items() if value.isdigit()}


def decision(program: list[seccomp.Instruction], audit: int, number: int, arguments: tuple[int, ...]) -> int:
    """What a filter says of a call, as the kernel runs it."""
    data, at, loaded = struct.pack("=IIQ6Q", number, audit, 0, *arguments), 0, 0
    while True:
        code, then, otherwise, value = program[at]
        at += 1
        if code == seccomp.RETURN:
            return value
        if code == seccomp.LOAD:
            (loaded,) = struct.unpack_from("=I", data, value)
            continue
        test = {
            seccomp.EQUAL: loaded == value,
            seccomp.ABOVE: loaded > value,
            seccomp.ANY_BIT: bool(loaded & value),
        }
        at += then if test[code] else otherwise


@pytest.mark.parametrize("machine", HEADERS)
def test_every_number_is_the_kernels(machine: str) -> None:
    of_kernel = numbers(*HEADERS[machine])
    known = max(number for number in of_kernel.values() if number <= seccomp.LAST_KNOWN)
    assert len(of_kernel) > 250
    column = seccomp.MACHINES[machine].column
    for entry in " ".join(seccomp._TABLES).split():
        name, *columns = entry.split(":")
        if columns[column] == "-":
            assert name not in of_kernel
        elif int(columns[column]) <= known:
            assert of_kernel[name] == int(columns[column]), name
    assert of_kernel["seccomp"] == seccomp.MACHINES[machine].seccomp


#: The last flags and families that anybody asks for: a thread's clone, an own process, IPv4, netlink, raw packets.
ARGUMENTS = (
    (PID, 9, 9),
    (0, 9, 9),
    (seccomp.CLONE_THREAD, 0, 0),
    (2, 1, 0),
    (16, 3, 0),
    (16, 3, 12),
    (17, 3, 0),
)


@pytest.mark.parametrize("role", ROLES)
def test_both_machines_decide_alike(role: str) -> None:
    """So what is seen on one holds on the other, where nothing runs."""
    here = numbers("asm/unistd.h")
    there = numbers(*HEADERS["aarch64"])
    machines = [seccomp.MACHINES[name] for name in (platform.machine(), "aarch64")]
    ours, theirs = (seccomp.program(machine, getattr(seccomp, role), PID) for machine in machines)
    modes = [seccomp.modes_program(machine, [5, 6]) for machine in machines]
    compared, refused = here.keys() & there.keys(), set()
    for name in compared:
        for arguments in ARGUMENTS:
            padded = (*arguments, 0, 0, 0)
            for first, second in ((ours, theirs), modes):
                one = decision(first, machines[0].audit, here[name], padded)
                assert one == decision(second, machines[1].audit, there[name], padded), name
                if one != seccomp.RET_ALLOW:
                    refused.add(name)
    assert len(compared) > 250 and {"execve", "clone", "kill", "socket", "io_uring_setup", "dup"} <= refused
    assert decision(theirs, OTHER_ABI, there["read"], (0,) * 6) == seccomp.RET_KILL_PROCESS
    assert all(
        decision(theirs, machines[1].audit, number, (0,) * 6) != seccomp.RET_ALLOW for number in (463, 999)
    )
