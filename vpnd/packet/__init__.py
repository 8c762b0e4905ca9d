"""Packets: records, IP headers, flow keys, offload headers, rings. Pure code, shared by supervisor and shards."""
