"""Architectures as data: a config and a name map for each family."""
