"""HTTP messages as the gateway reads and writes them."""
