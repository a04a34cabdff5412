"""What is sampled, on which clock, and how it is kept. It draws no conclusions."""
