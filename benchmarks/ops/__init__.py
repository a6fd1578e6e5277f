"""One suite per op."""
