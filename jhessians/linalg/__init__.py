"""Pure mathematics on arrays: symmetric products, eigendecompositions, damped inverses."""
