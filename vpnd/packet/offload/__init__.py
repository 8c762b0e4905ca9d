"""Superpackets: the virtio_net_hdr of records checked, cut for those who cannot take it, and made by merging.

check     what a peer's record must be before a TUN may see it
segment   a superpacket cut into what a peer takes, as the kernel would have cut it
coalesce  datagrams of one flow merged into a superpacket
"""

from __future__ import annotations

from vpnd.packet.offload.check import inspect_untrusted
from vpnd.packet.offload.coalesce import UdpCoalescer
from vpnd.packet.offload.segment import finish_checksum, fit_span, must_cut, segment

__all__ = ["UdpCoalescer", "finish_checksum", "fit_span", "inspect_untrusted", "must_cut", "segment"]
