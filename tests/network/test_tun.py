"""The TUN device as a real kernel gives it."""

from __future__ import annotations

import errno
import fcntl
import os
import selectors
import socket
import subprocess
import sys
import threading

import pytest

from supervisor.network import tun as tun_module
from supervisor.network.routes import NetworkSetup
from supervisor.network.tun import OFFLOAD_STEPS, Tun
from vpnd.errors import AlreadyRunningError, BadPacket, MachineError, PrivilegeError
from vpnd.packet.offload import inspect_untrusted
from vpnd.packet.record import GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, MAX_PACKET_BYTES, VNET, VNET_BYTES, Offload

UDP_SEGMENT = 103  # Linux include/uapi/linux/udp.h


def read_until(tun: Tun, wanted, timeout_s: float = 5.0) -> bytes:
    """Packets from the device until `wanted(packet)` holds."""
    with selectors.DefaultSelector() as selector:
        selector.register(tun.fd, selectors.EVENT_READ)
        while selector.select(timeout_s):
            packet = os.read(tun.fd, VNET_BYTES + MAX_PACKET_BYTES)
            if wanted(packet):
                return packet
    raise AssertionError("no such packet came")


@pytest.mark.root
def test_open_in_a_namespace(namespaces, entered) -> None:
    with entered(namespaces[0]), Tun.open("tn0", 1400, True) as tun:
        assert (tun.name, tun.mtu) == ("tn0", 1400)
        assert tun.offloads & Offload.CSUM
        assert not tun.offloads & Offload.TSO_ECN
        assert os.get_blocking(tun.fd) is False
        assert os.get_inheritable(tun.fd) is False
        assert fcntl.fcntl(tun.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert "tn0" in subprocess.check_output(["ip", "-br", "link"], text=True)


@pytest.mark.root
def test_close_removes_the_device(namespaces, entered) -> None:
    with entered(namespaces[0]):
        tun = Tun.open("tn0", 1400, True)
        tun.close()
        tun.close()
        assert "tn0" not in subprocess.check_output(["ip", "-br", "link"], text=True)


@pytest.mark.root
def test_death_removes_the_device(namespaces) -> None:
    name = namespaces[0]
    code = (
        "from supervisor.network.tun import Tun\n"
        "Tun.open('tn0', 1400, True)\n"
        "print('open', flush=True)\n"
        "input()"
    )
    process = subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        assert "tn0" in subprocess.check_output(["ip", "-n", name, "-br", "link"], text=True)
        process.kill()
    assert "tn0" not in subprocess.check_output(["ip", "-n", name, "-br", "link"], text=True)


@pytest.mark.root
@pytest.mark.parametrize("holder", ["another daemon", "a persistent TUN", "another kind of device"])
def test_name_in_use(namespaces, entered, holder: str) -> None:
    with entered(namespaces[0]):
        other = None
        if holder == "another daemon":
            other = Tun.open("tn0", 1400, True)
        elif holder == "a persistent TUN":
            subprocess.run(["ip", "tuntap", "add", "tn0", "mode", "tun"], check=True)
        else:
            subprocess.run(["ip", "link", "add", "tn0", "type", "veth"], check=True)
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.raises(AlreadyRunningError, match=r"tn0.*network\.interface"):
            Tun.open("tn0", 1400, True)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        if other is not None:
            other.close()


@pytest.mark.root
def test_without_privilege_says_sudo(namespaces) -> None:
    code = (
        "import os, sys; os.setgid(65534); os.setuid(65534)\n"
        "from supervisor.network.tun import Tun\n"
        "from vpnd.errors import PrivilegeError\n"
        "try: Tun.open('tn0', 1400, True)\n"
        "except PrivilegeError as error: print(error)"
    )
    # Imported before the rights go: the interpreter may live where nobody may read.
    code = "import supervisor.network.tun, vpnd.errors\n" + code
    command = ["ip", "netns", "exec", namespaces[0], sys.executable, "-c", code]
    assert "sudo" in subprocess.check_output(command, text=True)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOENT, MachineError, "modprobe tun"),
        (errno.ENXIO, MachineError, "modprobe tun"),
        (errno.EACCES, PrivilegeError, "sudo"),
        (errno.EMFILE, MachineError, "cannot open"),
    ],
)
def test_no_device_file(monkeypatch, number: int, kind: type[Exception], words: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tun_module.os, "open", refuse)
    with pytest.raises(kind, match=words):
        Tun.open("tn0", 1400, True)


@pytest.mark.parametrize(
    ("known", "granted"),
    [
        (OFFLOAD_STEPS[0], OFFLOAD_STEPS[0]),
        (OFFLOAD_STEPS[0] & ~(Offload.USO4 | Offload.USO6), OFFLOAD_STEPS[1]),
        (Offload.CSUM | Offload.TSO4, Offload.CSUM),
        (Offload.CSUM, Offload.CSUM),
        (Offload(0), Offload(0)),
    ],
)
def test_offloads_fall_back(monkeypatch, known: Offload, granted: Offload) -> None:
    def kernel(_: int, request: int, value: int) -> int:
        assert request == tun_module.TUNSETOFFLOAD
        if value & ~known:
            raise OSError(errno.EINVAL, "Invalid argument")
        return 0

    monkeypatch.setattr(tun_module.fcntl, "ioctl", kernel)
    assert tun_module._negotiate(3, "tn0", OFFLOAD_STEPS) == granted


@pytest.mark.root
@pytest.mark.parametrize("offloads", [True, False])
def test_udp_superpackets_only_when_asked_for(namespaces, entered, offloads: bool) -> None:
    with entered(namespaces[0]), Tun.open("tn0", 1400, offloads) as tun:
        NetworkSetup().apply("tn0", 1400, ["10.86.0.1/16"], [], 500)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
            sender.sendto(bytes(5500), ("10.86.0.2", 9))
        packet = read_until(tun, lambda _: True)
        flags, gso_type, _, gso_size, csum_start, csum_offset = VNET.unpack_from(packet)
        if tun.offloads & Offload.USO4:
            assert (flags, gso_type, gso_size, csum_start, csum_offset) == (1, GSO_UDP_L4, 1000, 20, 6)
            assert len(packet) == VNET_BYTES + 28 + 5500
        else:
            assert gso_type == gso_size == 0
            sizes = [len(packet)] + [len(read_until(tun, lambda _: True)) for _ in range(5)]
            assert sizes == [VNET_BYTES + 1028] * 5 + [VNET_BYTES + 528]


class Relay(threading.Thread):
    """Carries packets between two TUN devices, as two vpnd nodes would, and looks at each."""

    def __init__(self, tuns: list[Tun]) -> None:
        super().__init__()
        self.tuns = tuns
        self.largest = 0
        self.kinds: set[int] = set()
        self.refused: list[bytes] = []
        self.stop = threading.Event()

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for place in (0, 1):
                selector.register(self.tuns[place].fd, selectors.EVENT_READ, place)
            while not self.stop.is_set():
                for key, _ in selector.select(0.1):
                    packet = os.read(key.fd, VNET_BYTES + MAX_PACKET_BYTES)
                    self.kinds.add(packet[1])
                    self.largest = max(self.largest, len(packet) - VNET_BYTES)
                    try:
                        inspect_untrusted(memoryview(packet), 0, len(packet))
                    except BadPacket:
                        self.refused.append(packet)
                    os.write(self.tuns[1 - key.data].fd, packet)

    def __enter__(self) -> Relay:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.join()
        for tun in self.tuns:
            tun.close()


def transfer(sender: socket.socket, listener: socket.socket, address: str) -> None:
    """A megabyte over TCP, compared."""
    with sender, listener:
        listener.bind((address, 7000))
        listener.listen()
        sender.settimeout(10)
        sender.connect((address, 7000))
        receiver, _ = listener.accept()
        payload = os.urandom(1 << 20)
        writer = threading.Thread(target=sender.sendall, args=(payload,))
        writer.start()
        got = bytearray()
        with receiver:
            receiver.settimeout(10)
            while len(got) < len(payload):
                got += receiver.recv(1 << 16)
        writer.join()
    assert got == payload


@pytest.mark.root
@pytest.mark.parametrize("offloads", [True, False])
@pytest.mark.parametrize("version", [4, 6])
def test_tcp_superpackets_only_when_asked_for(namespaces, entered, offloads: bool, version: int) -> None:
    tuns: list[Tun] = []
    sockets: list[socket.socket] = []
    base, prefixlen = ("10.86.0.", 16) if version == 4 else ("fd00:86::", 64)
    for place, name in enumerate(namespaces[:2]):
        with entered(name):
            tuns.append(Tun.open("tn0", 1400, offloads))
            NetworkSetup().apply("tn0", 1400, [f"{base}{place + 1}/{prefixlen}"], [], 500)
            sockets.append(socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6))
    with Relay(tuns) as relay:
        transfer(sockets[0], sockets[1], f"{base}2")
    assert relay.refused == []
    if offloads:
        assert (GSO_TCPV4 if version == 4 else GSO_TCPV6) in relay.kinds
        assert relay.largest > 1400
    else:
        assert relay.kinds == {0}
        assert relay.largest == 1400


@pytest.mark.root
def test_what_a_gateway_forwards_passes_the_check(namespaces, entered) -> None:
    """A host behind a node, over veth: what the kernel forwards into the TUN was never made for it."""
    near, far, host = namespaces
    ip = ["ip", "-n"]
    for command in (
        [*ip, near, "link", "add", "tnv0", "type", "veth", "peer", "name", "tnv1", "netns", host],
        [*ip, near, "address", "add", "10.77.0.1/24", "dev", "tnv0"],
        [*ip, near, "link", "set", "tnv0", "up"],
        [*ip, host, "address", "add", "10.77.0.2/24", "dev", "tnv1"],
        [*ip, host, "link", "set", "tnv1", "mtu", "1400", "up"],
        [*ip, host, "route", "add", "10.86.0.0/16", "via", "10.77.0.1"],
    ):
        subprocess.run(command, check=True)
    tuns = []
    for place, name in enumerate((near, far)):
        with entered(name):
            tuns.append(Tun.open("tn0", 1400, True))
            routes = ["10.77.0.0/24"] if name == far else []
            NetworkSetup().apply("tn0", 1400, [f"10.86.0.{place + 1}/16"], routes, 500)
            with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
                file.write("1")
    with entered(host):
        sender = socket.socket()
    with entered(far):
        listener = socket.socket()
    with Relay(tuns) as relay:
        transfer(sender, listener, "10.86.0.2")
    assert relay.refused == []
    assert GSO_TCPV4 in relay.kinds
