"""A fit: passes over the data, eigenbases, factors, and how they share the memory."""
