"""What stays resident on a device: the broker session, a SQLite file and the plan. Imports neither torch nor numpy."""
