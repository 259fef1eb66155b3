"""The one adapter form, y = W x + (alpha / rank) B C A x, on the linear layers of a model."""
