"""Where experts live while a run trains: first table, measured traffic, decision, move."""
