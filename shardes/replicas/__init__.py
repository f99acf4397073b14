"""Replicas of a run: protocol, work queue, coordinator, gateway, joining."""
