"""One replica put together and run as a process: engine, worker, ranks and their guards."""
