"""Names of members: the DNS zone of a network, and telling the machine's resolver of it."""
