"""Predicted memory and time, and the search for a plan that fits; only the probe imports torch."""
