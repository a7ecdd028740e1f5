"""The class-shielding study: which classes stand in the way of others."""
