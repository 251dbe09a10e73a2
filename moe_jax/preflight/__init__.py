"""`moe-jax preflight`: the programs of a run, compiled for chips that are not there, and what the
compiler says of them: memory, collectives, a bound of their time.
"""
