"""The privileged process: TUN device, addresses and routes, rings, child processes."""
