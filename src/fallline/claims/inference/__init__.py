"""Claims of the methods in `inference`."""
