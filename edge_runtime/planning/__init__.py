"""Predicted peak memory and time, and the search for the largest model that fits a budget. Only the probe imports torch."""
