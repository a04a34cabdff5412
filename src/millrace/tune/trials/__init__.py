"""What was tried: outcomes, failures, scores, and the journal that keeps them."""
