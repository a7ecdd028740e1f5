"""Runnable scripts, and the models and data modules that they share."""
