"""Devices and processes that share the work."""
