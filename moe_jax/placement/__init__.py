"""Which device holds which expert: tables, planners, what a table costs, topology. Numpy and scipy
only.
"""
