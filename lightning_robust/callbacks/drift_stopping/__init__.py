"""RobustnessDriftStopping: what it reads, what it records, what it reports, and when it stops."""
