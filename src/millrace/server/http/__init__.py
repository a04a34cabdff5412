"""HTTP as every endpoint needs it: connections, bodies, errors, the middleware."""
