"""What to try next, and which trial won."""
