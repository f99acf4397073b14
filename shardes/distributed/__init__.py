"""Processes of a job: world, rendezvous, hosts, signals, environment."""
