"""Training in several rounds by clients, for models that leak as trained ones do."""
