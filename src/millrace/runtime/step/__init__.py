"""One step on a device: inputs, forward, sampling, results."""
