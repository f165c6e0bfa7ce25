"""What a scheme does to the answers of a model: the same questions to both, compared question by question."""
