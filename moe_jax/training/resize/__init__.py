"""More or fewer experts for a run, or experts for a dense model."""
