"""Rounds of many workers: compression, error feedback, lossy links, Byzantine workers, simulated or real."""
