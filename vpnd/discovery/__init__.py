"""Who the other nodes are, which virtual addresses are theirs, and where they can be dialed."""
