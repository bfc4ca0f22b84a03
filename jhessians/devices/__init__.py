"""Devices and hosts: the mesh, memory, precision of products."""
