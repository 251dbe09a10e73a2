"""Rows sorted by group times a matrix per group: `api` chooses among back ends, a file each."""
