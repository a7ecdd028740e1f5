"""Hessian trace and Weight-Curvature Index: how fast the loss rises when the weights move."""
