"""Claims of the methods in `clustering`."""
