"""Claims: each method's headline statement as an experiment, one module a method, mirrored by room."""
