"""Messages between the processes of a node, and the channel that carries them."""
