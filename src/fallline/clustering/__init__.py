"""Methods that group points around centers."""
