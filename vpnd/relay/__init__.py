"""The process that relays sessions of other members: bytes from one socket to another, and nothing else."""
