"""What a folder is, and how the model in it is described, opened and exported."""
