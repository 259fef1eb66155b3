"""Messages and payloads between devices and node, and the names of tensors in them."""
