"""Text from a model: sampling, streaming, chat, evaluation."""
