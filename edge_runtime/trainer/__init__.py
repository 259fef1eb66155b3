"""What the trainer process does: load a base model, evaluate, train one round, encode the delta, measure its memory."""
