"""How a fold sees every linear: sites, tape, traversal, routing of experts."""
