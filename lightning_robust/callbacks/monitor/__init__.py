"""RobustnessMonitor and the steps of one measurement."""
