"""RobustnessDriftStopping: what it reads, what it keeps, when it stops."""
