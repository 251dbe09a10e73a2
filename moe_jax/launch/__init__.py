"""What comes before a run: is this machine fit for it."""
