"""Put a mechanism into a host's model, and take it out again."""
