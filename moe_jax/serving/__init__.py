"""Serving a model to many at once: what an engine is asked for, and the API in front of it."""
