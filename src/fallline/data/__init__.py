"""Files of the user's, and data that installed packages carry."""
