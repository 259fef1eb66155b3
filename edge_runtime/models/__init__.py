"""Base models: where they come from, what their configuration says, which layers a depth slice keeps, their weights."""
