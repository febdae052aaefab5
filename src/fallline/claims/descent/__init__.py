"""Claims of the methods in `descent`."""
