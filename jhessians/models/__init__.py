"""One config-driven decoder, from which every supported family is made."""
