"""Stand-ins for a chip: the only rooms that patch an SDK. What runs here is never HARDWARE."""
