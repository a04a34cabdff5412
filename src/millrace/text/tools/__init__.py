"""Tool calls: what tools are offered, how calls are written, and how they are read."""
