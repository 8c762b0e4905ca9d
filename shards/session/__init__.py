"""Sessions with peers, on the shard's loop: the engine (`shards/stream`) with a transport under it."""
