"""Resident on a device: the broker session, a SQLite file, the plan. Imports no torch, no numpy."""
