"""What every method needs and nothing that only one room needs."""
