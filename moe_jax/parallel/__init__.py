"""The mesh, the one table from logical axes to mesh axes, and collectives inside `shard_map`."""
