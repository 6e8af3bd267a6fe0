"""Pixel Endpoint: a durable shared canvas over HTTP."""
