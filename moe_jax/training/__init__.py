"""The training job: step, optimizer, state, loop, placement decisions, resizing."""
