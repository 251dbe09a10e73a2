"""Text in: sources, tokenizers, packing, and batches that resume where they stopped."""
