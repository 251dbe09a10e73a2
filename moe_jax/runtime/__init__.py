"""All that is global to the process and nowhere else: devices, platform, processes, signals,
caches.
"""
