"""Influence: what gradients of queries and of training documents say of one another."""
