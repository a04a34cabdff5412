"""The APIs: one package for each family of endpoints, and what the families share."""
