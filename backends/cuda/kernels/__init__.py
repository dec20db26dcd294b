"""Device code: Triton alone. The host tables that launch it are in ../configurations.py."""
