"""What to run next: requests, pages, the prefix tree, the scheduler. Imports no torch."""
