"""From records and samples to figures."""
