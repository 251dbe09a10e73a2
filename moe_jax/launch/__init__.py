"""What comes before a run: whether this machine is fit for it."""
