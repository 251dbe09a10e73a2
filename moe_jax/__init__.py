"""Train and run sharded mixture-of-experts transformers in JAX, the same from a laptop to a pod."""

__version__ = "0.1.0"
