"""Giving up root, for good, and checking that nothing of it is left.

The children of the supervisor are started as root because what they inherit was opened with root's rights.
As soon as they hold it they call `drop`. What a child keeps afterwards:

- the descriptors it was given: they are its whole purpose;
- sockets of its own on unprivileged ports: control listens and dials;
- reading what anybody may read: resolver configuration, /proc/net;
- being killed together with its parent.
"""

from __future__ import annotations

import ctypes
import logging
import os
import pwd
import resource
import signal
from pathlib import Path

from vpnd.config.values import OWN_USER
from vpnd.errors import ChildError, PrivilegeError

# Linux include/uapi/linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_GET_PDEATHSIG = 2
PR_GET_DUMPABLE = 3
PR_SET_DUMPABLE = 4
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
# Linux include/uapi/linux/capability.h
CAPABILITY_VERSION_3 = 0x20080522
#: Capability numbers a kernel could know: the sets are 64 bits wide.
CAPABILITY_BITS = 64

#: The user there is everywhere.
SHARED_USER = "nobody"
SYSTEM_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
#: What makes a system user: of shadow, of BusyBox.
MAKERS = {
    "useradd": "--system --user-group --no-create-home --home-dir /nonexistent --shell /bin/false",
    "adduser": "-S -D -H -h /nonexistent -s /bin/false",
}

log = logging.getLogger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)
#: whom this process, or the one that it was forked from, has become
_become: str | None = None


def existing(user: str) -> str:
    """The user to run children as: `user`, but for vpnd's own one, which is made when it is missing.

    Where it cannot be made (no program for it, a read-only /etc) SHARED_USER: its processes can signal, stop and limit
    those of every other program that runs as it. Needs root; blocks for some milliseconds the first time.
    """
    if user != OWN_USER or _is_there(user):
        return user
    import shutil
    import subprocess  # both for this alone, and shards that are forked have what is imported above

    for program, options in MAKERS.items():
        if found := shutil.which(program, path=SYSTEM_PATH):
            made = subprocess.run(
                [found, *options.split(), user], capture_output=True, text=True, check=False
            )
            if _is_there(user):  # perhaps another node was quicker
                return user
            log.info("%s: %s", program, made.stderr.strip())
    return SHARED_USER


def entry_of(user: str) -> pwd.struct_passwd:
    """What the system knows of process.user. Raises PrivilegeError when there is no such user."""
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise PrivilegeError(f"there is no user {user!r}: set process.user to an unprivileged one") from None


def _is_there(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def drop(user: str, parent_pid: int) -> None:
    """Become `user`, without any capability, bound to the life of `parent_pid`.

    `parent_pid` is the process that must be alive for this one to go on (os.getppid() read before anything
    else). Without root only the parts that need none are done. Single-threaded callers only: the kernel keeps
    credentials per thread, and this changes the calling thread's and those Python starts later.
    Raises PrivilegeError when the user is unknown, is root, or any right is left; ChildError when the parent
    has died meanwhile. After an error the process must exit: it may have lost part of its rights.

    Forked from a process that has done so, only its life is to be bound: the rest is inherited, and cannot be had back.
    """
    global _become
    if _become == user:
        _bind_to(parent_pid)
        return
    was_root = os.geteuid() == 0
    if was_root:
        entry = entry_of(user)
        if entry.pw_uid == 0 or entry.pw_gid == 0:
            raise PrivilegeError(f"user {user!r} is root: set process.user to an unprivileged one")
        # The bounding set can be emptied only while CAP_SETPCAP is still held, so before the user changes.
        for capability in range(CAPABILITY_BITS):
            if _prctl(PR_CAPBSET_READ, capability, allow=True) == 1:
                _prctl(PR_CAPBSET_DROP, capability)
        try:
            os.setgroups([])
            os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
            os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
        except OSError as error:
            raise PrivilegeError(
                f"may not become user {user} ({error.strerror}): give it the capabilities SETUID and SETGID "
                "(a container or a service unit may have taken them away)"
            ) from None
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    _clear_capabilities()
    # After the change of user: that change clears the signal.
    _bind_to(parent_pid)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    # Keys lie in this process's memory: no core file, no ptrace or /proc/PID/mem by the same user.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(PR_SET_DUMPABLE, 0)
    os.umask(0o077)
    left = rights_left(was_root)
    if left:
        raise PrivilegeError(f"rights are left after giving them up: {', '.join(left)}")
    _become = user


def _bind_to(parent_pid: int) -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # died before the line above took effect: no signal will come
        raise ChildError("the supervisor died while this process was starting")


def rights_left(was_root: bool) -> list[str]:
    """What this process still holds that `drop` takes away, in words; empty is good.

    `was_root`: the bounding set counts. Who never was root cannot empty it, and gains nothing by it.
    """
    left = []
    if 0 in os.getresuid() or 0 in os.getresgid():
        left.append("root as user or group")
    if 0 in os.getgroups():
        left.append("root as supplementary group")
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    for line in status.splitlines():
        name, _, value = line.partition(":")
        counts = name in ("CapInh", "CapPrm", "CapEff", "CapAmb") or (name == "CapBnd" and was_root)
        if counts and int(value, 16):
            left.append(f"{name} {value.strip()}")
    if not _prctl(PR_GET_NO_NEW_PRIVS):
        left.append("new privileges by exec")
    if _prctl(PR_GET_DUMPABLE):
        left.append("dumpable")
    if resource.getrlimit(resource.RLIMIT_CORE)[0]:
        left.append("core files")
    death_signal = ctypes.c_int()
    _prctl(PR_GET_PDEATHSIG, ctypes.addressof(death_signal))
    if death_signal.value != signal.SIGKILL:
        left.append("life after the parent's death")
    return left


def _prctl(option: int, argument: int = 0, *, allow: bool = False) -> int:
    """prctl(2); `allow` returns a failure as -1 instead of raising PrivilegeError."""
    result: int = _libc.prctl(ctypes.c_int(option), *map(ctypes.c_ulong, (argument, 0, 0, 0)))
    if result < 0 and not allow:
        raise PrivilegeError(f"prctl({option}, {argument}): {os.strerror(ctypes.get_errno())}")
    return result


def _clear_capabilities() -> None:
    """capset(2) with all three sets of this thread empty. Giving up what one does not hold cannot fail."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    if _libc.capset(header, data) != 0:
        raise PrivilegeError(f"capset: {os.strerror(ctypes.get_errno())}")
