"""The bridge to py-libp2p: the only code that knows how it is built and what must be guarded against.

libp2p is pinned; what is used beyond its documented interface is listed and checked in `shape`.
"""
