"""The server's side of its engine: the process, the sockets, the open requests."""
