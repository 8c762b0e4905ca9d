"""The version of vpnd: read by the package's build, told in status, to other nodes and by `vpnd version`."""

__version__ = "0.1.0"
