"""The nursery: a process that has imported what the children of a node run, and forks them.

    talks to    over                            what comes, and who serves it
    ----------  ------------------------------  -----------------------------
    supervisor  channel (inherited descriptor)  NurseryStart, Fork

Children that are forked share the memory of what was imported, and begin in some milliseconds instead of the third of
a second that a fresh interpreter takes. They are the supervisor's children, not the nursery's (CLONE_PARENT): it waits
for them, they are bound to its life, and the nursery may die without harm to any. They also share where things lie in
memory: who knows that of one knows it of all. So control, which has the identity key, is not forked.

Rights kept after the start: the channel. A child that it forks has no more; the descriptors it needs come to it from
the supervisor. It has no thread beside its own, and neither a key nor a packet.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import platform
import signal
import sys

from vpnd import lean

with lean.without(missing=lean.SPARE):
    from vpnd import privileges, seccomp
    from vpnd.api import messages
    from vpnd.api.channel import Channel, await_message, first_message, run_child

#: Linux include/uapi/linux/sched.h
CLONE_PARENT = 0x8000
#: Number of clone, which os.fork gives no flag, by machine.
CLONE = {"x86_64": 56, "aarch64": 220}
#: arg_start and arg_end among the fields of /proc/PID/stat behind the command's name; proc(5) counts from 3.
ARGUMENTS = slice(45, 47)

# Unlike CDLL it keeps the GIL, which the child must have.
_libc = ctypes.PyDLL(None, use_errno=True)


def main() -> None:
    """`python -m vpnd.nursery CHANNEL_FD`."""
    run_child("nursery", _main)


def _main(channel: Channel, parent_pid: int) -> None:
    start, _ = first_message(channel, messages.NurseryStart)
    gc.disable()
    with lean.without(*lean.IDLE, missing=lean.SPARE):
        mains = {name: importlib.import_module(f"{name}.main").main for name in start.modules}
    privileges.drop(start.config.process.user, parent_pid)
    if start.config.process.seccomp:
        seccomp.confine(seccomp.NURSERY)
        seccomp.prepare(seccomp.SHARD, seccomp.RELAY)
    arguments = _arguments()
    if hasattr(sys, "_clear_type_cache"):  # it counts references to names that only imports asked for
        sys._clear_type_cache()
    gc.collect()
    lean.settle()  # no collection writes to the memory that all share
    channel.send(messages.Ready())
    while True:
        message, descriptors = await_message(channel)
        assert isinstance(message, messages.Fork)
        (child_fd,) = descriptors
        try:
            pid = fork_sibling()
        except OSError as error:
            channel.send(messages.Forked(pid=0, error=str(error)))
        else:
            if pid == 0:
                channel.close()
                _look_like(message.module, child_fd, *arguments)
                mains[message.module]()
            channel.send(messages.Forked(pid=pid, error=""))
        os.close(child_fd)


def fork_sibling() -> int:
    """fork(2), but the new process is a child of this one's parent: 0 in it, its pid here. Raises OSError.

    Only for processes of one thread: what another one holds would be held for ever in the new process.
    """
    number = CLONE.get(platform.machine())
    if number is None or len(os.listdir("/proc/self/task")) > 1:
        raise OSError("not on this machine")
    _libc.PyOS_BeforeFork()
    pid: int = _libc.syscall(number, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
    error = ctypes.get_errno()
    if pid == 0:
        _libc.PyOS_AfterFork_Child()
    else:
        _libc.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(error, os.strerror(error))
    return pid


def _arguments() -> tuple[int, int]:
    """Where the arguments begin and end that are shown of this process, and of those it forks."""
    with open("/proc/self/stat", "rb") as file:
        start, end = map(int, file.read().rpartition(b")")[2].split()[ARGUMENTS])
    return start, end


def _look_like(module: str, channel_fd: int, start: int, end: int) -> None:
    """Seem to be `python -m MODULE CHANNEL_FD`, in a session of its own; these are shown between `start` and `end`."""
    os.setsid()
    sys.argv = [module, str(channel_fd)]
    line = b"\0".join(map(str.encode, [sys.executable, "-P", "-m", *sys.argv])) + b"\0"
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, line, min(len(line), end - start - 1))


if __name__ == "__main__":
    main()
