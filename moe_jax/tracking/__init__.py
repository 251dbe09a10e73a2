"""What a run leaves on disk and how it is looked at: its directory, metrics, figures, reports, the
live view.
"""
