"""The daemon: requests in and answers out over MQTT, on an engine that changes its size."""
