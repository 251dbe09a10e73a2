"""Time series to train on: corpora on disk, series that are made up, windows in batches."""
