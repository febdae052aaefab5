"""Reports: folders with one self-contained page, its figures, the arrays, and the command that repeats the run."""
