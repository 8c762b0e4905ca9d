"""Who is in a network: signed statements, the directory they add up to, and how it spreads. No I/O but in `store`."""
