"""The drift rule: has a series of measurements fallen below its best by more than chance explains?"""
