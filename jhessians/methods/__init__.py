"""How each method fits and writes its Hessian, and what options it has. One kind, one file."""
