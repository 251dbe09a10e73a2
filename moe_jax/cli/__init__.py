"""The `moe-jax` command: arguments in, one call of the package, sentences out."""
