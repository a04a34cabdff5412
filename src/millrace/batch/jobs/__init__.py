"""The batches of a server: their API, their catalog, and the process that runs them."""
