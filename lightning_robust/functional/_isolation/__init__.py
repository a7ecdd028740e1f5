"""Measuring inside somebody else's training loop without leaving a trace."""
