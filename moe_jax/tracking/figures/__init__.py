"""Pictures of a run and of placements."""
