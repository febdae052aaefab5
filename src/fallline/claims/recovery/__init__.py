"""Claims of the methods in `recovery`."""
