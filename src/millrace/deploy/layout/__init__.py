"""What a deploy file means: its keys, settings by the planner, numbers, times and commands."""
