"""Answers with a base model and what its fleet has learned: text, labels, and an HTTP interface."""
