"""Formats of other programs: torch files, safetensors shards, factored Hessian directories."""
