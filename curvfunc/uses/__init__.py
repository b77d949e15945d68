"""How a use of a parameter and a cotangent become a result. Knows nothing of models, operations and losses."""
