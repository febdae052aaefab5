"""Claims of the methods in `landscape`."""
