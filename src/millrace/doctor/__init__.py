"""Looking at a machine before it serves: each module looks at one thing and writes a report."""
