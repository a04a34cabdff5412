"""Records between engines: handshake, transports, leases. What is a record is known elsewhere."""
