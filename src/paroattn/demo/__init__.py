"""The bundled model: code, weights, plan, and the story told with them."""
