"""A run drawn as one HTML page, or several runs over one another. Imports neither torch nor megatron."""
