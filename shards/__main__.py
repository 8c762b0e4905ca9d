"""`python -m shards CHANNEL_FD`: one shard, started by the supervisor."""

from shards.main import main

if __name__ == "__main__":
    main()
