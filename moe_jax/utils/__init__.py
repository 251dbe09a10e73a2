"""Small tools that need nothing of the package but its exception: units, files, progress, shape
annotations.
"""
