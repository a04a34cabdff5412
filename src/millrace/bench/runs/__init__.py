"""The runs that `millrace bench` offers."""
