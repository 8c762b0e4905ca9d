"""A byte ring in shared memory: one producer process, one consumer process, records of any length.

Memory. A memfd holds one header page and `size` bytes of data (a power of two). Each side maps the data twice,
back to back, so that any run of bytes up to `size` is contiguous in `buffer`, across the ring's end too: a
consumer seals a span of many records in one call and a reader reads a 64 KB superpacket straight into its place.
Positions are 64-bit counts of bytes since the ring was made; they only grow.

    header, in 64-bit words     written by   word
    tail: bytes published       producer     0      (each on a cache line of its own)
    head: bytes released        consumer     8
    consumer sleeps             both         16

Scratch. The producer never fills the last SCRATCH bytes before `head`: the consumer may overwrite the SCRATCH bytes
in front of an unreleased span, which is where a shard puts the frame header that is sealed together with it.

Order. Publishing is: write the records, fence, store `tail`. The consumer loads `tail`, then reads the
records. Releasing is: read the records, fence, store `head`. A producer without room drops or comes again:
nobody waits for room. Falling asleep is: store `sleeps` = 1, fence, load `tail` again; waking is: store
`tail`, fence, load `sleeps`. With a full barrier between store and load on both sides, at least one of the
two sees the other's store, so a wake-up is never lost (Dekker's argument). On x86-64 stores are not
reordered with stores nor loads with loads (Intel SDM 3A, 8.2.2), and an uncontended lock is a locked
instruction, hence a full barrier: that is `fence` there. Elsewhere `fence` is membarrier(2) with
MEMBARRIER_CMD_GLOBAL_EXPEDITED, which begins and ends with a full barrier on the caller. Words are read and
written through a memoryview of native 64-bit items, each one aligned 8-byte access.

Trust. A shard is less trusted than the supervisor: `Producer.room` and `Consumer.readable` check the other
side's word and raise RingBroken when it is impossible.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import threading
from collections.abc import Callable

from vpnd.metrics import shared_memory

TAIL, HEAD, SLEEPS = 0, 8, 16
HEADER_BYTES = mmap.PAGESIZE
#: A ring is hardly used when less than this part of it is filled between two `rest`s.
LITTLE = 16
#: Bytes in front of a span that belong to the consumer. A Yamux header has 12; 16 keeps the number round.
SCRATCH = 16

_PROT_NONE, _PROT_READ_WRITE = 0, 3
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_MADV_REMOVE = 9
_SYS_MEMBARRIER = {"aarch64": 283, "riscv64": 283, "armv7l": 389, "ppc64le": 365, "s390x": 356}
_MEMBARRIER_GLOBAL_EXPEDITED, _MEMBARRIER_REGISTER_GLOBAL_EXPEDITED = 1 << 1, 1 << 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


class RingBroken(Exception):
    """The other side wrote an impossible position. Its process is at fault: give up the ring and the process."""


def _make_fence() -> Callable[[], object]:
    machine = platform.machine()
    if machine in ("x86_64", "AMD64", "i686"):
        lock = threading.Lock()

        def locked() -> None:
            with lock:
                pass

        return locked
    number = _SYS_MEMBARRIER.get(machine)
    if number is None or _libc.syscall(number, _MEMBARRIER_REGISTER_GLOBAL_EXPEDITED, 0, 0) != 0:
        raise OSError(f"no full memory barrier known for {machine}: rings cannot be used here")
    return lambda: _libc.syscall(number, _MEMBARRIER_GLOBAL_EXPEDITED, 0, 0)


#: A full memory barrier of the calling thread.
fence = _make_fence()


def lazy_buffer(size: int) -> memoryview:
    """Writable memory of this process. Its pages are taken as they are written to, a bytearray's all at once."""
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def give_back(made: memoryview) -> None:
    """What is in a `lazy_buffer` is not needed any more: its pages are the kernel's until they are written to again."""
    memory = made.obj
    assert isinstance(memory, mmap.mmap)
    memory.madvise(mmap.MADV_DONTNEED)


class Descriptors:
    """What makes a ring, as descriptors to be passed to the other process: memory, and an eventfd to wake
    the consumer."""

    def __init__(self, memory: int, wake: int) -> None:
        self.memory, self.wake = memory, wake

    @classmethod
    def create(cls, size: int, title: str) -> Descriptors:
        """A new, empty ring of `size` data bytes (a power of two, whole pages). Nothing appears in any file system."""
        if size & (size - 1) or size % mmap.PAGESIZE:
            raise ValueError(f"ring size {size} is not a power of two of whole pages")
        shared = shared_memory(title, HEADER_BYTES + size)
        return cls(shared, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def all(self) -> tuple[int, int]:
        """In the order of the constructor."""
        return self.memory, self.wake

    def close(self) -> None:
        """Close both; mappings live on."""
        for fd in self.all():
            os.close(fd)


class _Side:
    """What both sides share: the mapping. Descriptors stay the caller's; the eventfd must outlive this object."""

    def __init__(self, descriptors: Descriptors) -> None:
        self.size = os.fstat(descriptors.memory).st_size - HEADER_BYTES
        self.mask = self.size - 1
        self.wake_fd = descriptors.wake
        self._header = mmap.mmap(descriptors.memory, HEADER_BYTES)
        self._words = memoryview(self._header).cast("Q")
        self._address = _map_twice(descriptors.memory, self.size)
        #: The data, twice: 2 * size bytes, writable. Dead after close().
        self.buffer = memoryview((ctypes.c_ubyte * (2 * self.size)).from_address(self._address)).cast("B")

    def used(self) -> int:
        """Bytes published and not yet released; of this moment."""
        return max(0, self._words[TAIL] - self._words[HEAD])

    def close(self) -> None:
        """Unmap. Every view of `buffer` must be gone: a read through one would end the process."""
        self.buffer.release()
        self._words.release()
        self._header.close()
        _libc.munmap(self._address, 2 * self.size)


def _map_twice(fd: int, size: int) -> int:
    address: int | None = _libc.mmap(None, 2 * size, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    if address == _MAP_FAILED or address is None:
        raise OSError(ctypes.get_errno(), f"no room for a ring of {size} bytes")
    for half in (address, address + size):
        flags = _MAP_SHARED | _MAP_FIXED
        if _libc.mmap(half, size, _PROT_READ_WRITE, flags, fd, HEADER_BYTES) == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), "a ring could not be mapped")
    return address


class Producer(_Side):
    """The writing side. Owner: one loop of one process; not thread-safe.

    reserve → write into `buffer` → commit, any number of times, then publish.
    """

    def __init__(self, descriptors: Descriptors) -> None:
        super().__init__(descriptors)
        self._tail = self._words[TAIL]
        self._published = self._tail
        self._head = self._words[HEAD]
        self._capacity = self.size - SCRATCH
        #: where it was at the last but one `rest`, and what had been given back
        self._rested = self._given_back = self._tail

    def reserve(self, count: int) -> int:
        """Offset in `buffer` with room for `count` contiguous bytes, or -1 when the ring is too full.

        Nothing is taken until `commit`; a later reserve before it gives the same place.
        """
        if self._tail - self._head + count > self._capacity:
            head = self._words[HEAD]
            if not self._head <= head <= self._published:
                raise RingBroken(f"head is {head}, published {self._published}")
            self._head = head
            if self._tail - head + count > self._capacity:
                return -1
        return self._tail & self.mask

    def broken(self) -> bool:
        """Whether the consumer wrote an impossible position."""
        return not 0 <= self._words[HEAD] <= self._published

    def commit(self, count: int) -> int:
        """The `count` bytes at the reserved offset are a record; not seen by the consumer before `publish`. How many
        bytes are not published now."""
        self._tail = tail = self._tail + count
        return tail - self._published

    def rest(self) -> None:
        """Called now and then: give the kernel the memory of a ring that is hardly used any more, and empty."""
        before, self._rested = self._rested, self._tail
        little = self.size // LITTLE
        if self._tail - before <= little < self._tail - self._given_back and self._words[HEAD] == self._tail:
            _libc.madvise(self._address, self.size, _MADV_REMOVE)  # of the memfd, so for the consumer as well
            self._given_back = self._tail

    @property
    def unpublished(self) -> int:
        """Bytes committed and not yet published."""
        return self._tail - self._published

    def publish(self) -> None:
        """Let the consumer see all that was committed, and wake it if it sleeps."""
        words = self._words
        fence()
        words[TAIL] = self._published = self._tail
        fence()
        if words[SLEEPS]:
            words[SLEEPS] = 0
            try:
                os.eventfd_write(self.wake_fd, 1)
            except BlockingIOError:  # the consumer has filled it itself: it is awake
                pass


class Consumer(_Side):
    """The reading side. Owner: one loop of one process; not thread-safe."""

    def __init__(self, descriptors: Descriptors) -> None:
        super().__init__(descriptors)
        self._head = self._words[HEAD]

    def readable(self) -> tuple[int, int]:
        """(start, end) of everything published, as offsets in `buffer`; equal when there is nothing.

        The span is contiguous, and buffer[start - SCRATCH : start] may be overwritten.
        borrowed: valid until release().
        """
        count = self._words[TAIL] - self._head
        if not 0 <= count <= self.size:
            raise RingBroken(f"tail is {self._words[TAIL]}, head {self._head}")
        start = self._head & self.mask
        if start < SCRATCH:
            start += self.size
        return start, start + count

    def release(self, count: int) -> None:
        """The first `count` readable bytes are done with; the producer may overwrite them."""
        fence()
        self._head += count
        self._words[HEAD] = self._head

    def sleep(self) -> bool:
        """Ask for `wake_fd` to be signalled at the next publish. False: there is something to read already."""
        words = self._words
        words[SLEEPS] = 1
        fence()
        if words[TAIL] != self._head:
            words[SLEEPS] = 0
            return False
        return True


def drain(fd: int) -> None:
    """Take the signal out of an eventfd; harmless when there is none."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        pass
