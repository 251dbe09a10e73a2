"""Everything that is global to the process: devices, platform, signals, terminal, caches."""
