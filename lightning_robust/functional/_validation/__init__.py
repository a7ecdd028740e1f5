"""Argument and tensor checks. Each error says what was expected and what was given."""
