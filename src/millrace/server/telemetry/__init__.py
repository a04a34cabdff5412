"""What the server reports about itself: metrics, and the prefixes it holds."""
