"""The trainer process: loads a base model, evaluates it, trains one round, and encodes the delta."""
