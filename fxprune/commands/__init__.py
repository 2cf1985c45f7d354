"""Parts of the command line: where models and images come from, where results go, and what becomes of errors."""
