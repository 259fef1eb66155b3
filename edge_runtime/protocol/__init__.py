"""What travels between devices and node, and what it is called: canonical keys, codec, round, report."""
