"""A page that shows the node live: the process that serves it, and what it serves."""
