"""Claims of the methods in `distributed`."""
