"""Predicted peak memory, and the search for the largest model that fits a budget. Imports no torch."""
