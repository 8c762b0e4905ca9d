"""The datagram engine: records in, sealed datagrams out, and back; no socket, loop or clock in it."""
