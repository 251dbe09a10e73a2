"""The transformer and its parts, and the tree of its parameters."""
