"""The link of devices and nodes: MQTT sessions, presence, signatures, crash-proof transfers."""
