"""What the kernel is asked of a session's socket is what it then says of it."""

from __future__ import annotations

import socket

import pytest

from shards.session.transport import TCP_DELACK_MAX_US, TCP_NOTSENT_LOWAT, TCP_RTO_MIN_US, tune
from vpnd.config.schema import Session


@pytest.mark.setting("session.not_sent_lowat_bytes", "session.user_timeout", "session.congestion_control")
def test_options_are_those_of_the_settings() -> None:
    settings = Session(not_sent_lowat_bytes=1 << 17, user_timeout=7.5, congestion_control="reno")
    with socket.socket() as sock:
        tune(sock, settings)
        asked = (
            sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (TCP_NOTSENT_LOWAT, socket.TCP_USER_TIMEOUT)
        )
        assert [*asked] == [1 << 17, 7500]
        name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        assert name.rstrip(b"\0") == b"reno"


def test_a_congestion_control_that_is_not_there_leaves_the_systems() -> None:
    with socket.socket() as sock, socket.socket() as plain:
        tune(sock, Session(congestion_control="no-such-thing"))
        names = [
            each.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
            for each in (sock, plain)
        ]
        assert names[0] == names[1]


@pytest.mark.setting("session.retransmit_min", "session.ack_delay_max")
def test_timers_are_those_of_the_settings_where_the_kernel_has_them() -> None:
    with socket.socket() as sock:
        try:
            sock.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MIN_US)
        except OSError:
            tune(sock, Session())  # and it does without
            pytest.skip("this kernel is older than Linux 6.15")
        tune(sock, Session(retransmit_min=0.04, ack_delay_max=0.02))
        timers = [
            sock.getsockopt(socket.IPPROTO_TCP, option) for option in (TCP_RTO_MIN_US, TCP_DELACK_MAX_US)
        ]
    assert timers == [40_000, 20_000]
