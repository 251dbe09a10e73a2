"""Models that run: engine, cache, sessions, opening a model, experts that do not fit."""
