"""Models as traced equations: the only room that knows jaxprs."""
