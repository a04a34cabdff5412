"""What is kept of a stream so that another replica can continue it."""
