"""The machine's side of the VPN: the TUN device, its addresses and routes, and what they may collide with."""
