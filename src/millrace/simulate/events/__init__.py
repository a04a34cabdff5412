"""A fleet event by event: the engine's scheduler and the gateway's policies themselves."""
