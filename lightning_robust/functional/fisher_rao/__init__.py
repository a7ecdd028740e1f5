"""Fisher–Rao geometry of predictions: distances, paths to other classes, class shielding."""
