"""The HTTP surface, a file for each family of endpoints."""
