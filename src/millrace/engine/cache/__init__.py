"""The prefix cache: pools of pages and snapshots, and the policies that decide what is cached."""
