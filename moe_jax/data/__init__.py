"""Text in: sources, tokenizers, packing, a corpus of batches that resumes where it stopped."""
