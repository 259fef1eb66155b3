"""The link between devices and nodes: MQTT sessions, presence, signatures, crash-proof transfers."""
