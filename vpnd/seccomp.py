"""What the kernel refuses a child, from then on and for ever: system calls that no part of it needs (seccomp(2)).

A child without rights can still ask the kernel for a lot: start programs, trace or signal processes of its own user,
make namespaces, load BPF. Most holes of kernels are behind such calls.

Everything is permitted but what is listed here, for libc, OpenSSL and Python choose their calls by their versions: a
list of what is permitted would end nodes with an update of the machine. But what is newer than this file does not
exist for a child (ENOSYS), and libraries take the older way then. What is refused fails with EPERM. The process does
not die of it: the harmless attempt of a library must not cost packets, and whoever has taken a child over gains no
more from one than from the other.

The packet path pays a look-up in a bitmap: since 5.11 the kernel knows which calls a filter always permits. For older
ones those of the packet path are asked for first.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import platform
import socket
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vpnd.errors import PrivilegeError

# Linux include/uapi/linux/seccomp.h
SET_MODE_FILTER, GET_ACTION_AVAIL = 1, 2
#: Threads there are already too; no slower memory for it (kernels before 5.16).
FLAG_TSYNC, FLAG_SPEC_ALLOW = 1, 4
RET_KILL_PROCESS, RET_ERRNO, RET_ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]
NR, ARCH, ARGUMENTS = 0, 4, 16
# Linux include/uapi/linux/bpf_common.h
LOAD, EQUAL, ABOVE, ANY_BIT, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
#: One instruction: u16 code, u8 jump when true, u8 jump when false (in instructions), u32 value.
INSTRUCTION = struct.Struct("HBBI")

CLONE_THREAD = 0x10000
NETLINK_ROUTE = 0
#: The last call this file knows (mseal); the numbers are the same everywhere from 424 on.
LAST_KNOWN = 462


class Machine(NamedTuple):
    """`audit`: AUDIT_ARCH_* of Linux' include/uapi/linux/audit.h. `column`: of the numbers below."""

    audit: int
    column: int
    seccomp: int


MACHINES = {"x86_64": Machine(0xC000_003E, 0, 317), "aarch64": Machine(0xC000_00B7, 1, 277)}

#: name:x86-64:aarch64; "-": there is none.
_HOT = """
    read:0:63 write:1:64 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 writev:20:66
    epoll_wait:232:- epoll_pwait:281:22 futex:202:98 splice:275:76 ioctl:16:29
"""
#: Of no use to any child.
_NEVER = """
    execve:59:221 execveat:322:281 fork:57:- vfork:58:- ptrace:101:117 process_vm_readv:310:270
    process_vm_writev:311:271 kcmp:312:272 pidfd_getfd:438:438 process_madvise:440:440 process_mrelease:448:448
    pidfd_send_signal:424:424 kill:62:129 tkill:200:130 rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240
    setpriority:141:140 ioprio_set:251:30 sched_setparam:142:118 sched_setscheduler:144:119
    sched_setattr:314:274 sched_setaffinity:203:122 migrate_pages:256:238 move_pages:279:239

    mount:165:40 umount2:166:39 pivot_root:155:41 chroot:161:51 open_tree:428:428 move_mount:429:429
    fsopen:430:430 fsconfig:431:431 fsmount:432:432 fspick:433:433 mount_setattr:442:442 setns:308:268
    unshare:272:97 swapon:167:224 swapoff:168:225 quotactl:179:60 quotactl_fd:443:443 acct:163:89
    name_to_handle_at:303:264 open_by_handle_at:304:265 mknod:133:- mknodat:259:33 fanotify_init:300:262
    fanotify_mark:301:263

    init_module:175:105 finit_module:313:273 delete_module:176:106 kexec_load:246:104 kexec_file_load:320:294
    reboot:169:142 bpf:321:280 perf_event_open:298:241 syslog:103:116 iopl:172:- ioperm:173:- modify_ldt:154:-
    personality:135:92 userfaultfd:323:282 vhangup:153:58 settimeofday:164:170 clock_settime:227:112
    clock_adjtime:305:266 adjtimex:159:171 sethostname:170:161 setdomainname:171:162

    add_key:248:217 request_key:249:218 keyctl:250:219 shmget:29:194 semget:64:190 msgget:68:186 mq_open:240:180
"""
#: What libraries replace by something older where it does not exist; asynchronous I/O would go past all other rules.
_UNKNOWN = "clone3:435:435 io_uring_setup:425:425 io_uring_enter:426:426 io_uring_register:427:427"
#: Changes to the file system, and opening what is there.
_FILES = """
    open:2:- openat:257:56 openat2:437:437 creat:85:- rename:82:- renameat:264:38 renameat2:316:276 unlink:87:-
    unlinkat:263:35 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36 mkdir:83:- mkdirat:258:34 rmdir:84:-
    chmod:90:- fchmod:91:52 fchmodat:268:53 fchmodat2:452:452 chown:92:- lchown:94:- fchown:93:55
    fchownat:260:54 truncate:76:45 ftruncate:77:46 utime:132:- utimes:235:- futimesat:261:- utimensat:280:88
    memfd_create:319:279
"""
#: Connections that the process was not given.
_NETWORK = "socket:41:198 connect:42:203 bind:49:200 listen:50:201"
_ACCEPTING = "accept:43:202 accept4:288:242"
#: What would make a second number of a descriptor.
_DUPLICATES = "dup:32:23 dup2:33:- dup3:292:24 socketpair:53:199"
_JUDGED = "clone:56:220 tgkill:234:131 prlimit64:302:261 fcntl:72:25"

_libc = ctypes.CDLL(None, use_errno=True)


class Role(NamedTuple):
    """What a child needs of that. `families`: of sockets it makes. `files`: it opens and writes files. `accepts`: it
    accepts connections. `forks`: it makes processes, in which the same holds, and which may be stricter."""

    families: tuple[int, ...] = ()
    files: bool = False
    accepts: bool = False
    forks: bool = False


#: libp2p, DNS, addresses of the machine (netlink), name services of libc (AF_UNIX); files of its network.
CONTROL = Role((socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK), files=True, accepts=True)
EXPORTER = Role(accepts=True)
#: What its children do until they are confined themselves.
NURSERY = Role(files=True, forks=True)
#: They have the descriptors that they are given.
RELAY = SHARD = Role()


#: Stands for the process's own until that is known: no process has it, and nothing else in a filter is like it.
_SOME_PID = 0x5EC0_4B1D


def why_not() -> str:
    """Why this machine cannot do it, as a user is told; empty when it can."""
    machine = MACHINES.get(platform.machine())
    if machine is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        return f"vpnd does not know the system calls of {platform.machine()}"
    action = ctypes.c_uint32(RET_ERRNO)
    if _libc.syscall(machine.seccomp, GET_ACTION_AVAIL, 0, ctypes.byref(action)) != 0:
        return f"the kernel has no seccomp filters here ({os.strerror(ctypes.get_errno())})"
    return ""


def confine(role: Role) -> None:
    """Refuse this process, its threads too, what `role` does not need; nothing takes it back. Does nothing where
    `why_not` says why.

    After `privileges.drop`, which sets no_new_privs, and before an event loop is made: libuv would put io_uring into
    it, and could not do without it any more. Raises PrivilegeError.
    """
    if why_not():
        return
    with contextlib.suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1")  # glibc loads it when the first thread is ended from outside
    _install(_code(role).replace(_word(_SOME_PID), _word(os.getpid())))


def prepare(*roles: Role) -> None:
    """Make what `confine` needs for them, which children share that are forked from this process."""
    if not why_not():
        for role in roles:
            _code(role)


def keep_modes(shared: Sequence[int]) -> None:
    """Refuse this process to set anything of these descriptors (ioctl, fcntl), for other processes depend on how they
    are set; so that it has them under no other numbers, it can duplicate none. As `confine` otherwise.
    """
    if why_not():
        return
    _install(_packed(modes_program(MACHINES[platform.machine()], shared)))


@functools.cache
def _code(role: Role) -> bytes:
    """The filter of a role, for _SOME_PID."""
    return _packed(program(MACHINES[platform.machine()], role, _SOME_PID))


def _packed(instructions: Sequence[Instruction]) -> bytes:
    return b"".join(INSTRUCTION.pack(*each) for each in instructions)


def _word(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


def _install(code: bytes) -> None:
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: unsigned short len; struct sock_filter *filter
    fprog = struct.pack("HP", len(code) // INSTRUCTION.size, ctypes.addressof(buffer))
    machine = MACHINES[platform.machine()]
    result = _libc.syscall(machine.seccomp, SET_MODE_FILTER, FLAG_TSYNC | FLAG_SPEC_ALLOW, fprog)
    if result != 0:
        raise PrivilegeError(
            f"seccomp: {os.strerror(ctypes.get_errno())}: set process.seccomp = false to do without"
        )


def holds(pid: int) -> bool:
    """Whether the kernel has a filter for that process which this one does not have. False for one that has ended."""
    return _filters(str(pid)) > _filters("self")


def _filters(process: str) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return int(fields.get("Seccomp_filters", int(fields.get("Seccomp") == "2")))  # counted from kernel 5.9 on


# --- the program


#: code, jump when true, jump when false, value
Instruction = tuple[int, int, int, int]


def _return(value: int) -> Instruction:
    return (RETURN, 0, 0, value)


ALLOWED, REFUSED, UNKNOWN = map(_return, (RET_ALLOW, RET_ERRNO | errno.EPERM, RET_ERRNO | errno.ENOSYS))
NO_FAMILY = _return(RET_ERRNO | errno.EAFNOSUPPORT)


def program(machine: Machine, role: Role, pid: int) -> list[Instruction]:
    """What decides about each call. `pid`: of the process it is for."""
    rules = Rules(machine)
    for name in _names(_HOT):
        rules.add(name, ALLOWED)
    rules.code += [(ABOVE, 0, 1, LAST_KNOWN), UNKNOWN]  # also the calls of x32, which have a bit of their own
    for name in _names(_UNKNOWN):
        rules.add(name, UNKNOWN)
    never = _names(_NEVER)
    if not role.files:
        never += _names(_FILES)
    if not role.families:
        never += _names(_NETWORK)
    if not role.accepts:
        never += _names(_ACCEPTING)
    for name in never:
        rules.add(name, REFUSED)
    if not role.forks:
        rules.add("clone", (LOAD, 0, 0, ARGUMENTS), (ANY_BIT, 1, 0, CLONE_THREAD), REFUSED, ALLOWED)
        rules.add("tgkill", *_among(0, (pid,), ALLOWED, REFUSED))
        rules.add("prlimit64", *_among(0, (0, pid), ALLOWED, REFUSED))
    if role.families:
        netlink = _among(2, (NETLINK_ROUTE,), ALLOWED, NO_FAMILY)
        rules.add(
            "socket",
            (LOAD, 0, 0, ARGUMENTS),
            (EQUAL, 0, len(netlink), socket.AF_NETLINK),
            *netlink,
            *_among(0, role.families, ALLOWED, NO_FAMILY),
        )
    return [*rules.code, ALLOWED]


def modes_program(machine: Machine, shared: Sequence[int]) -> list[Instruction]:
    """See `keep_modes`."""
    rules = Rules(machine)
    for name in _names(_DUPLICATES):
        rules.add(name, REFUSED)
    rules.add("fcntl", *_among(1, (fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL), ALLOWED, REFUSED))
    rules.add("ioctl", *_among(0, shared, REFUSED, ALLOWED))
    return [*rules.code, ALLOWED]


class Rules:
    """The program so far. A rule is about one call, and its `body` ends in a decision whatever the call's arguments."""

    def __init__(self, machine: Machine) -> None:
        self._numbers = {name: number for text in _TABLES for name, number in _numbers(text, machine)}
        self.code: list[Instruction] = [
            (LOAD, 0, 0, ARCH),
            (EQUAL, 1, 0, machine.audit),
            _return(RET_KILL_PROCESS),  # another ABI of the machine, with other numbers
            (LOAD, 0, 0, NR),
        ]

    def add(self, name: str, *body: Instruction) -> None:
        """Nothing where the machine has no such call."""
        if name in self._numbers:
            self.code.append((EQUAL, 0, len(body), self._numbers[name]))
            self.code.extend(body)


_TABLES = (_HOT, _NEVER, _UNKNOWN, _FILES, _NETWORK, _ACCEPTING, _DUPLICATES, _JUDGED)


def _among(
    argument: int, values: Sequence[int], then: Instruction, otherwise: Instruction
) -> list[Instruction]:
    """Whether an argument, of which the lower 32 bits count, is one of these."""
    count = len(values)
    tests = [(EQUAL, count - place, 0, value) for place, value in enumerate(values)]
    return [(LOAD, 0, 0, ARGUMENTS + 8 * argument), *tests, otherwise, then]


def _names(text: str) -> list[str]:
    return [entry.partition(":")[0] for entry in text.split()]


def _numbers(text: str, machine: Machine) -> Iterable[tuple[str, int]]:
    for entry in text.split():
        name, *columns = entry.split(":")
        if columns[machine.column] != "-":
            yield name, int(columns[machine.column])
