"""Data-plane workers: move packets between their rings and their sessions with other nodes."""
