"""The node: rounds, their store, checks of what devices send, and merging. Imports no torch."""
