"""Planted faults and honest variants: the suite's own examination."""
