"""Training: the outer loops, the update and the log."""
