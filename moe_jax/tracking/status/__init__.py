"""How a run does: its processes, load and checkpoints, and where its time went."""
