"""Statistics → decisions → file."""
