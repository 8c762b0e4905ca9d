"""The control process: a node's one py-libp2p host, which makes sessions and hands them to the shards."""

import vpnd.adapter  # noqa: F401  # before libp2p is imported, wherever that is
