"""The link between devices and nodes: MQTT sessions, presence, signatures, and transfers that survive any crash."""
