"""Methods that are wrong on purpose, one a module: `CASE`, and in `CAUGHT_BY` the check meant for it."""
